"""What a run is: the fields of a configuration file, their defaults and their limits.

A configuration is flat, so that a field and the command-line flag that overrides it share a name;
only the text (`data`) has a section of its own. Learning rates are those of the method's own
update: `lr` belongs to the matrices that the method projects, `plain_lr` to everything else.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from subspan.train.errors import JobError
from subspan.train.tracking import TrackerName

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, lt=1)]


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, values are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


T = TypeVar("T", bound=Section)


class DataConfig(Section):
    """Text, tokenizer and packing."""

    corpus: str | list[str] = "docstrings"
    """Built-in name (`subspan data list`), `datasets:NAME`, or files and folders."""
    packages: list[str] = ["torch"]
    """Installed packages whose docstrings join the standard library's in `docstrings`."""
    text_field: str = "text"
    """Field (column) of .jsonl and .parquet files that holds the text."""
    tokenizer: str | None = None
    """Folder of a tokenizer in Hugging Face layout; none: train one on the training text."""
    vocab_size: Annotated[int, Field(ge=257)] = 4096
    """Size of a tokenizer trained here: 256 bytes, one end-of-text token, the rest merges."""
    sequence_length: Annotated[int, Field(ge=2)] = 256
    """Tokens of one packed sequence."""
    validation_share: Share = 0.05
    """Share of the documents that is held out."""
    validation_tokens: Positive = 65536
    """At most so many held-out tokens are used, as sequences evenly spaced over the split."""
    cache: str | None = None
    """Folder for tokenised text; none: $SUBSPAN_CACHE, else the user's cache folder."""


class TrainConfig(Section):
    """One training run."""

    output: str = "runs/train"
    """Run folder."""
    model: str = "micro"
    """Named LLaMA size or a local folder with config.json, with or without weights."""
    data: DataConfig = DataConfig()

    method: str = "galore"
    """Name of a recipe (`subspan methods`)."""
    lr: Rate = 0.01
    """Peak learning rate of the projected matrices."""
    plain_lr: Rate | None = None
    """Peak learning rate of embeddings, head, norms and biases; none: `lr`."""
    rank: Annotated[int, Field(ge=1)] | Share | None = None
    """Rank, or a share of the smaller dimension; none: the method's default."""
    update_proj_gap: Positive | None = None
    """Steps between two refreshes of the subspace; none: the method's default."""
    scale: Rate | None = None
    """Factor of the lifted update (Fira's is `alpha`, an option); none: the method's default."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.999,
    )
    eps: Rate = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decay of matrices and embeddings; norms and biases have none."""
    method_options: dict[str, Any] = {}
    """Any other option of the method."""
    project: list[str] | None = None
    """Regular expressions of names of parameters to project; none: the blocks' matrices."""
    exclude: list[str] | None = None
    """Regular expressions of names of parameters never to project."""

    steps: Positive | None = None
    """Optimizer steps; give this or `tokens`."""
    tokens: Positive | None = None
    """Training tokens, rounded up to whole steps."""
    batch_size: Positive = 16
    """Sequences of one forward pass, of all processes together; each gets an equal share."""
    accumulation: Positive = 1
    """Forward passes of one optimizer step."""
    warmup: Count | Share = 0.1
    """Warm-up steps, or their share of all steps."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Where the cosine ends, as a share of the peak learning rate."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest gradient norm; 0: no clipping."""
    update_in_backward: bool = False
    """Update every parameter inside the backward pass and free its gradient at once."""
    clipping: Literal["whole", "inside", "each"] = "whole"
    """With `update_in_backward`, whose norm `clip` limits: that of all gradients, of what the
    subspaces hold of them, or of each parameter's own."""
    activation_checkpointing: bool = False
    """Keep only the inputs of the model's blocks; compute the rest again in the backward pass."""
    int8_weights: bool = False
    """Hold the blocks' linear weights in int8, written back with stochastic rounding."""

    log_every: Positive = 10
    eval_every: Positive | None = None
    """Steps between two evaluations; none: a tenth of the run. The last step is evaluated."""
    checkpoint_every: Positive | None = None
    """Steps between two checkpoints; none: a quarter of the run."""
    keep_checkpoints: Positive = 2

    seed: Count = 0
    """Seed of the initial weights, the order of the data and everything random."""
    dtype: Literal["float32", "bfloat16", "bfloat16-mixed"] = "float32"
    """bfloat16: weights and activations; bfloat16-mixed: float32 weights under autocast."""
    device: Literal["auto", "cpu"] = "auto"
    threads: Positive | None = None
    """Threads of one operation on the CPU; results are reproducible for a fixed number."""
    compile: bool = False
    """Compile the model with torch.compile."""
    track: list[TrackerName] = ["tensorboard"]
    """Where the numbers go besides the run folder: tensorboard, wandb, trackio."""
    record_subspaces: bool = False
    """Write overlap, captured energy and effective rank at refreshes to subspaces.jsonl."""

    parallel: Literal["fsdp", "ddp"] = "fsdp"
    """With several processes: shard parameters and state over them, or keep copies of both."""
    projected_gradients: bool = False
    """With `parallel: ddp` and several processes, average coordinates instead of gradients between
    refreshes; for methods that discard the residual. The run is the same up to rounding."""

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.steps is not None and self.tokens is not None:
            raise ValueError("steps and tokens are both given; give one of them")
        if self.clipping != "whole" and not self.update_in_backward:
            raise ValueError(f"clipping={self.clipping!r} needs update_in_backward")
        if self.projected_gradients and self.parallel != "ddp":
            raise ValueError("projected_gradients needs parallel=ddp")
        if self.projected_gradients and self.clip:
            raise ValueError("projected_gradients needs clip=0: norms of gradients are not known")
        if self.update_in_backward and self.compile:
            raise ValueError("update_in_backward cannot be combined with compile")
        if isinstance(self.warmup, int) and self.warmup > self.total_steps:
            raise ValueError(
                f"warmup={self.warmup} steps is longer than the run of {self.total_steps} steps"
            )
        return self

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step on one device."""
        return self.batch_size * self.accumulation * self.data.sequence_length

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run (1 000 when neither steps nor tokens is given)."""
        if self.tokens is not None:
            return math.ceil(self.tokens / self.tokens_per_step)
        return self.steps or 1000

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warm-up."""
        if isinstance(self.warmup, int):
            return self.warmup
        return math.ceil(self.warmup * self.total_steps)

    @property
    def eval_steps(self) -> int:
        """Steps between two evaluations."""
        return self.eval_every or max(1, self.total_steps // 10)

    @property
    def checkpoint_steps(self) -> int:
        """Steps between two checkpoints."""
        return self.checkpoint_every or max(1, math.ceil(self.total_steps / 4))

    def hyper(self) -> dict[str, Any]:
        """Hyper-parameters that were given for the method, without `lr` and the Adam settings.

        Raises:
            JobError: an option stands in `method_options` although it has a field of its own.
        """
        fields = ("lr", "plain_lr", "rank", "update_proj_gap", "scale", "betas", "eps")
        for name in (*fields, "weight_decay", "params"):
            if name in self.method_options:
                raise JobError(
                    f"method_options.{name}: give {name} as a field of the configuration instead"
                )
        names = ("seed", "rank", "update_proj_gap", "scale")
        given = {name: getattr(self, name) for name in names}
        return {k: v for k, v in given.items() if v is not None} | self.method_options

    def identity(self) -> dict[str, Any]:
        """The part of the configuration that decides the result of the run."""
        values = self.model_dump(mode="json")
        technical = ("activation_checkpointing", "parallel", "projected_gradients")
        for name in ("output", "track", "record_subspaces", "keep_checkpoints", *technical):
            values.pop(name)
        values["data"].pop("cache")
        return values


def parse(kind: type[T], values: dict[str, Any], source: str) -> T:
    """Validate `values`; the first problem becomes one line that starts with `source`.

    Raises:
        JobError: a key is unknown, missing or has a value that is not allowed.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise JobError(f"{source}: {_first_problem(kind, error)}") from None


def _first_problem(kind: type[Section], error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    # Members of a union appear in the location under names of types; only keys mean anything here.
    place = [str(part) for part in problem["loc"]]
    depth = 0
    while depth < len(place) and (inner := _section(kind, place[depth])) is not None:
        kind, depth = inner, depth + 1
    if problem["type"] == "extra_forbidden":
        return f"unknown key {'.'.join(place)}; known: {', '.join(kind.model_fields)}"
    text = problem["msg"].removeprefix("Value error, ")
    text = text[0].lower() + text[1:]
    if problem["type"] == "value_error" and depth == len(place):
        return f"{'.'.join(place)}: {text}" if place else text
    return f"{'.'.join(place[: depth + 1])}={problem['input']!r}: {text}"


def _section(kind: type[Section], name: str) -> type[Section] | None:
    """The section that field `name` of `kind` is, if it is one."""
    field = kind.model_fields.get(name)
    kinds = (field.annotation, *get_args(field.annotation)) if field is not None else ()
    return next((k for k in kinds if isinstance(k, type) and issubclass(k, Section)), None)
