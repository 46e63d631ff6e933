"""How much of a real gradient's energy a basis captures, relative to the exact top-r basis.

A small LLaMA is trained for 50 steps on the docstrings of the standard library; gradients of the
q, up and down projections of three layers are kept after 10 steps, when they are richest, and after
50, when the model knows little more than word frequencies and a few directions hold nearly all
energy. Our bases are read from an optimizer that was given those gradients: "first" from a single
one, "next" at a refresh that follows one on a gradient from some steps earlier, as in training.
"""

from __future__ import annotations

import ast
import re
import statistics
import sysconfig
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import timed
from benchmarks.shapes import Shape, decaying_gradient

_KEPT = {5: 10, 40: 50}  # step of the previous refresh -> step of the refresh that is judged
_BATCH, _LENGTH = 8, 128
_LAYERS = (0, 4, 7)
_MATRICES = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
_RANKS = (64, 16, 4)


def _docstrings(limit: int) -> str:
    """About `limit` characters of standard-library docstrings, in a fixed order."""
    texts, size = [], 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                texts.append(text)
                size += len(text)
        if size > limit:
            break
    return "\n\n".join(texts)


def _tokens(vocab: int) -> Tensor:
    """Words and punctuation, numbered by frequency; the rare ones share number 0."""
    words = re.findall(r"\w+|[^\w\s]|\n", _docstrings(1_000_000))
    numbers = {word: i + 1 for i, (word, _) in enumerate(Counter(words).most_common(vocab - 1))}
    return torch.tensor([numbers.get(word, 0) for word in words])


def real_gradients(shape: Shape) -> tuple[list[Tensor], list[Tensor], float]:
    """Gradients at the steps of a previous refresh and of the one judged, and the last loss."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // 64,
        max_position_embeddings=_LENGTH,
    )
    model = LlamaForCausalLM(config)
    wanted = [f"model.layers.{i}.{name}.weight" for i in _LAYERS for name in _MATRICES]
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    data, generator = _tokens(shape.vocab), torch.Generator().manual_seed(0)
    kept: dict[int, list[Tensor]] = {}
    loss = torch.tensor(0.0)
    for step in range(1, max(_KEPT.values()) + 1):
        starts = torch.randint(len(data) - _LENGTH, (_BATCH,), generator=generator).tolist()
        batch = torch.stack([data[s : s + _LENGTH] for s in starts])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        if step in _KEPT or step in _KEPT.values():
            kept[step] = [named[name].grad.detach().clone() for name in wanted]
        optimizer.step()
        optimizer.zero_grad()
    before = [gradient for step in _KEPT for gradient in kept[step]]
    return before, [gradient for step in _KEPT.values() for gradient in kept[step]], loss.item()


def captured_share(gradient: Tensor, basis: Tensor) -> float:
    """Energy of `gradient` inside the span of `basis`, over that inside the exact top-r one.

    The columns of `basis` (or its rows, if it is stored transposed) are orthonormalised first, so
    that a basis gains nothing by not being orthonormal.
    """
    columns = (basis if basis.shape[0] >= basis.shape[1] else basis.t()).double()
    q, _ = torch.linalg.qr(columns)
    g = gradient.double()
    side = g if g.shape[1] == q.shape[0] and g.shape[0] >= g.shape[1] else g.t()
    exact = torch.linalg.svdvals(g)[: q.shape[1]].square().sum()
    return float((side @ q).square().sum() / exact)


def _short_side(gradient: Tensor) -> Tensor:
    return gradient if gradient.shape[0] >= gradient.shape[1] else gradient.t()


def _exact(gradient: Tensor, rank: int) -> Tensor:
    return torch.linalg.svd(_short_side(gradient), full_matrices=False).Vh[:rank].t()


def _svd_lowrank(gradient: Tensor, rank: int) -> Tensor:
    q = min(rank + 8, *gradient.shape)
    return torch.svd_lowrank(_short_side(gradient), q=q, niter=2)[2][:, :rank]


def exact_share(gradient: Tensor, rank: int) -> float:
    """Share of all energy that the exact top-r basis captures."""
    energies = torch.linalg.svdvals(gradient.double()).square()
    return float(energies[:rank].sum() / energies.sum())


def _summary(finder: str, rank: int, shares: list[float], seconds: float) -> dict[str, Any]:
    middle = statistics.median(shares)
    return {
        "finder": finder,
        "rank": rank,
        "median": middle,
        "min": min(shares),
        "seconds": seconds,
    }


def _reference(
    name: str, find: Callable[[Tensor, int], Tensor], gradients: list[Tensor], rank: int
) -> dict[str, Any]:
    shares, seconds = [], []
    for gradient in gradients:
        start = time.process_time()
        basis = find(gradient, rank)
        seconds.append(time.process_time() - start)
        shares.append(captured_share(gradient, basis))
    return _summary(name, rank, shares, statistics.median(seconds))


def _basis_of(state: dict[str, Any], rank: int) -> Tensor:
    """The stored basis of one parameter: the state entry whose name says so."""
    found = [v for k, v in state.items() if "basis" in k and isinstance(v, Tensor) and v.dim() == 2]
    if len(found) != 1:
        raise LookupError(f"expected one basis of rank {rank} in the state, found {sorted(state)}")
    return found[0]


def _ours(
    name: str, earlier: list[Tensor] | None, last: list[Tensor], rank: int, **options: Any
) -> dict[str, Any]:
    """Bases that an optimizer finds for `last`, after a refresh on `earlier` if that is given."""
    import subspan.optim

    parameters = [nn.Parameter(torch.zeros_like(g)) for g in last]
    optimizer = subspan.optim.build(
        "galore", parameters, lr=1e-3, rank=rank, update_proj_gap=1, **options
    )
    for gradients in [last] if earlier is None else [earlier, last]:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        elapsed = timed(optimizer.step)
    shares = [
        captured_share(g, _basis_of(optimizer.state[p], rank))
        for p, g in zip(parameters, last, strict=True)
    ]
    # The whole step is counted; projecting and lifting are a small part of it.
    return _summary(name, rank, shares, elapsed.cpu / len(last))


def _compare(
    kind: str, earlier: list[Tensor] | None, last: list[Tensor], rank: int
) -> list[dict[str, Any]]:
    rows = [
        _reference("torch.linalg.svd, exact", _exact, last, rank),
        _reference("torch.svd_lowrank, q = r + 8, niter 2", _svd_lowrank, last, rank),
        _ours("subspan default, first", None, last, rank),
    ]
    if earlier is not None:
        rows.append(_ours("subspan default, next", earlier, last, rank))
    rows.append(_ours("subspan finder='svd'", None, last, rank, finder="svd"))
    shares = [exact_share(gradient, rank) for gradient in last]
    exact = {"exact_min": min(shares), "exact_max": max(shares)}
    return [{"gradients": kind, **exact, **row} for row in rows]


def measure_quality(small: Shape, large: Shape, progress: Callable[[str], None]) -> dict[str, Any]:
    """Rows of captured energy and time per basis, for ours and two references.

    Real gradients come from a model of the small shape. Gradients of a small model early in
    training are of low rank and easy; the slowly decaying random ones of the large shape, on which
    the step is timed, are harder.
    """
    rows, setting = [], ""
    try:
        earlier, last, loss = real_gradients(small)
    except ImportError as error:
        setting = f"No real gradients: {error.name} is not installed. "
    else:
        torch.set_num_threads(1)
        for rank in _RANKS:
            rows += _compare("real", earlier, last, rank)
        setting = (
            f"Real: {', '.join(m.split('.')[-1] for m in _MATRICES)} in layers "
            f"{', '.join(map(str, _LAYERS))} of a {small.name.upper()} LLaMA (hidden "
            f"{small.hidden}) after {' and '.join(map(str, _KEPT.values()))} steps of AdamW on "
            "standard-library docstrings, "
            f"{_BATCH} x {_LENGTH} tokens per step, loss {loss:.2f} at the end. "
        )
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    sizes = sorted(set(large.projected()))
    synthetic = [decaying_gradient(m, n, generator) for m, n in sizes for _ in range(2)]
    rows += _compare("synthetic", None, synthetic, large.rank)
    setting += (
        f"Synthetic: the random gradients of the {large.name.upper()} timing, rank {large.rank}. "
        "Energies in float64, relative to the exact top-r basis."
    )
    for row in rows:
        named = f"{row['gradients']} rank {row['rank']} {row['finder']}"
        progress(f"energy, {named}: {row['median']:.5f}, worst {row['min']:.5f}")
    return {"setting": setting, "rows": rows}
