"""FRUGAL: a stateful optimizer on a small part of the gradient, a stateless one on all the rest."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Literal

from subspan.optim.composition import Composition
from subspan.optim.parts.activity import Blocks
from subspan.optim.parts.descent import SGD, Lion, SignDescent
from subspan.optim.parts.inner import Adam, Inner
from subspan.optim.parts.output import Discard, Stateless
from subspan.optim.parts.refresh import Every
from subspan.optim.parts.transport import Keep, Reset
from subspan.optim.registry import recipe
from subspan.subspaces.finders import (
    SVD,
    Finder,
    RandomCoordinates,
    RandomOrthogonal,
    resolve_finder,
)

_RULES: dict[str, Literal["sign", "sgd"] | None] = {"sign_sgd": "sign", "sgd": "sgd", "no": None}
_CHOICES = ("block", "svd", "random", "randperm", "columns", "rows", "randk")
# Where a projection does not choose coordinates, and where it fixes the side.
_FINDERS: dict[str, Finder] = {"svd": SVD(), "random": RandomOrthogonal()}
_SIDES = {"columns": "right", "rows": "left", "randk": "entries"}


@recipe(
    "frugal",
    paper="Zmushko et al.: FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for "
    "Scalable Training, 2024, arXiv 2411.07837",
    lr=1e-3,
    memory="2 density mn (blocks, columns, rows, randk); round(density m) (m + 2n) (svd, random)",
    evidence=(
        "record: frugal_galore_{svd_sign,svd_sgd,svd_sgdm,baseline,random_sign,randperm_sign}, "
        "frugal_coord_{columns,rows,randk,columns_lion}, "
        "frugal_block_{random,ascending,descending}",
        "limit: density 1 is the inner optimizer; density 0 keeps no state",
    ),
    departures=(
        "Random choices derive from `seed`, the parameter and the step, not from the global "
        "generator.",
        "official_momentum_start=True starts SGD's buffer from a copy of the first gradient (of "
        "the weight, for unprojected tensors and blocks), as the code does.",
        "A refresh looks at every parameter's own counter; the code reads the first one's of the "
        "group.",
    ),
)
def FRUGAL(
    *,
    density: float = 0.25,
    update_gap: int = 200,
    projection: str = "block",
    block_order: str = "random",
    proj_type: str = "std",
    inner: str = "adamw",
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    momentum: float = 0.0,
    inactive_update_rule: str = "sign_sgd",
    inactive_lr_scale: float = 1.0,
    proj_params_lr_scale: float = 1.0,
    reset_statistics: bool = True,
    official_momentum_start: bool = False,
    finder: str | Finder | None = None,
) -> Composition:
    """Adam, Lion or SGD on a share of the gradient; signSGD on everything left, in the same step.

    The share changes every gap.

    Args:
        density: share of the gradient (of the smaller dimension, of columns, rows, entries, or
            tensors) with state.
        update_gap: steps between changes of that share.
        projection: "block" (whole tensors), "svd", "random" (orthonormal), "randperm" (coordinates
            of the smaller dimension), "columns", "rows" or "randk" (entries).
        block_order: "random", "ascending", "descending" or "mirror" (block).
        proj_type: std, reverse_std, left, right or full (svd, random, randperm).
        inner: "adamw", "lion" or "sgd".
        betas: averaging rates (adamw, lion; Lion's own are (0.9, 0.99)).
        eps: added to the root of the second moment after the bias correction (adamw).
        momentum: of SGD.
        inactive_update_rule: "sign_sgd", "sgd", or "no" for the rest of the gradient.
        inactive_lr_scale: learning rate of that rule relative to `lr`.
        proj_params_lr_scale: factor on the learning rate of everything projected.
        reset_statistics: restart the moments at a change; False keeps them as they are.
        official_momentum_start: see the departures.
        finder: replaces the projection's own finder.
    """
    _check_choice("inactive_update_rule", inactive_update_rule, _RULES)
    _check_choice("projection", projection, _CHOICES)
    core, plain = _inner(
        inner, betas, eps, momentum, official_momentum_start, projection == "block"
    )
    rule = _RULES[inactive_update_rule]
    if projection == "block":
        idle = SignDescent() if rule == "sign" else SGD()
        weight = 0.0 if rule is None else inactive_lr_scale
        return Composition(
            inner=core,
            plain=plain,
            activity=Blocks(density, update_gap, block_order),  # type: ignore[arg-type]
            idle=Composition(idle, lr_scale=proj_params_lr_scale * weight),
            lr_scale=proj_params_lr_scale,
        )
    default = _FINDERS.get(projection, RandomCoordinates())
    return Composition(
        inner=core,
        plain=plain,
        finder=resolve_finder(default if finder is None else finder, default),
        rank=float(density),
        proj_type=_SIDES.get(projection, proj_type),
        refresh=Every(update_gap),
        transport=Reset() if reset_statistics else Keep(),
        remainder=Discard() if rule is None else Stateless(rule, inactive_lr_scale),
        lr_scale=proj_params_lr_scale,
    )


def _check_choice(name: str, value: str, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(allowed)}")


def _inner(
    inner: str,
    betas: tuple[float, float],
    eps: float,
    momentum: float,
    official_start: bool,
    blocks: bool,
) -> tuple[Inner, Inner]:
    if inner == "adamw":
        adam = Adam(betas, eps)
        return adam, adam
    if inner == "lion":
        lion = Lion(betas)
        return lion, lion
    if inner == "sgd":
        sgd = SGD(momentum)
        if not official_start:
            return sgd, sgd
        whole = replace(sgd, start="parameter")
        return whole if blocks else replace(sgd, start="gradient"), whole
    raise ValueError(f"inner={inner!r} is not known: use adamw, lion or sgd")
