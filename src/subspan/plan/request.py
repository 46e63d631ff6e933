"""From the flags of `subspan plan` to what is planned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from subspan.plan.configs import named_size
from subspan.plan.model import ModelSpec, check_spec
from subspan.plan.settings import Settings
from subspan.train.errors import JobError, one_line
from subspan.train.model import has_weights

# Flags that describe the model, and those that describe training; the latter are fields of
# `Settings` of the same name.
_OF_MODEL = ("vocab_size", "sequence_length", "dtype", "attention", "int8_weights")
_OF_TRAINING = (
    "batch_size",
    "accumulation",
    "checkpointing",
    "update_in_backward",
    "clip",
    "clipping",
)
_CHOICES = {
    "dtype": ("float32", "bfloat16", "bfloat16-mixed"),
    "attention": ("auto", "eager", "sdpa", "flash"),
    "base_weights": ("none", "int8", "int4"),
    "checkpointing": ("none", "full"),
    "clipping": ("whole", "inside", "each"),
    "device": ("cpu", "cuda"),
}


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    Args:
        base: everything but method and options.
        methods: registered names.
        rank: given by the user.
        storage: given by the user.
        options: other options, for every method that is planned.
        all_methods: whether the methods were not named one by one.
    """

    base: Settings
    methods: tuple[str, ...]
    rank: int | float | None
    storage: str | dict[str, str] | None
    options: Mapping[str, Any]
    all_methods: bool

    def options_of(self, method: str) -> dict[str, Any]:
        """The options of one method. A rank asked for all methods is for those that have a free
        one."""
        from subspan.optim import lookup

        defaults, options = lookup(method).defaults, dict(self.options)
        if self.rank is not None and (
            not self.all_methods or ("rank" in defaults and defaults["rank"] != 1)
        ):
            options["rank"] = self.rank
        if self.storage is not None:
            options["storage"] = self.storage
        return options

    def settings_of(self, method: str) -> Settings:
        """What is planned for one method."""
        return replace(self.base, method=method, options=self.options_of(method))


def read_request(
    flags: Mapping[str, Any], config: Path | None = None, *, searches: bool = False
) -> Request:
    """What flags, over a training configuration, ask for.

    Args:
        flags: by name; those that were not given are None.
        config: YAML file of `subspan train`.
        searches: with a budget, all methods are meant unless some are named.

    Raises:
        JobError: a value that is not allowed, naming it and what is.
    """
    given = {name: value for name, value in flags.items() if value not in (None, [], ())}
    for name, allowed in _CHOICES.items():
        if name in given and given[name] not in allowed:
            raise JobError(
                f"--{name.replace('_', '-')} {given[name]!r} must be one of {', '.join(allowed)}"
            )
    below = _configured(config) if config is not None else {"options": {}}
    given = {**below, **given}
    if "model" not in given:
        raise JobError("name a model: --model llama-7b, a folder, a config.json or module:function")
    source = str(given["model"])
    spec = ModelSpec(
        named_size(source) or source,
        **{name: given[name] for name in _OF_MODEL if name in given},
        adapter=str(given["adapter"]) if "adapter" in given else None,
        base_weights=given.get("base_weights", "none"),
    )
    check_spec(spec)
    extra = {name: given[name] for name in (*_OF_TRAINING, "ranks", "device") if name in given}
    asked = [name for text in given.get("method", []) for name in text.split(",") if name]
    everything = asked == ["all"] or (not asked and searches)
    options = {**given["options"], **_read_options(given.get("option", []))}
    return Request(
        Settings(spec, **extra),
        _names(asked, everything),
        _read_rank(given.get("rank")),
        _read_storage(given.get("storage")),
        options,
        everything,
    )


def _names(asked: Sequence[str], everything: bool) -> tuple[str, ...]:
    from subspan.optim import lookup, methods

    if everything:
        return tuple(sorted(methods()))
    try:
        return tuple(lookup(name).name for name in asked or ["galore"])
    except ValueError as error:
        raise JobError(one_line(error)) from None


def _configured(file: Path) -> dict[str, Any]:
    """The flags that a training configuration amounts to."""
    from subspan.train.overrides import train_config

    config = train_config(file, {})
    options = config.hyper() | {
        name: value
        for name in ("project", "exclude")
        if (value := getattr(config, name)) is not None
    }
    options.pop("seed", None)
    found: dict[str, Any] = {
        name: getattr(config, name) for name in (*_OF_MODEL, *_OF_TRAINING) if hasattr(config, name)
    }
    found |= {"sequence_length": config.data.sequence_length, "model": config.model}
    found["checkpointing"] = "full" if config.activation_checkpointing else "none"
    if config.data.tokenizer is None and not has_weights(config.model):
        found["vocab_size"] = config.data.vocab_size
    found["method"] = [config.method]
    for name in ("rank", "storage"):
        if name in options:
            found[name] = options.pop(name)
    return {**found, "options": options}


def _read_rank(value: Any) -> int | float | None:
    if value is None or isinstance(value, (int, float)):
        return value
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    raise JobError(f"--rank {value!r} must be an integer, or a share of the smaller dimension")


def _read_storage(value: Any) -> str | dict[str, str] | None:
    """ "int8", or "basis=int4,first_moment=int8"."""
    if value is None or isinstance(value, dict) or "=" not in value:
        return value
    return dict(item.strip().partition("=")[::2] for item in value.split(","))


def _read_options(items: Sequence[str]) -> dict[str, Any]:
    from subspan.train.yamlfile import read_value

    options = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals or not name:
            raise JobError(f"--option {item}: write KEY=VALUE, for example --option density=0.5")
        options[name] = read_value(text, f"--option {name}")
    return options
