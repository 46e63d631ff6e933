"""Formats of optimizer states: time per element, bytes per element, and what is lost.

    python -m benchmarks.storage

prints a Markdown table for ours and for those of bitsandbytes and torchao that are installed. Every
format stores the same flat tensor and reads it back, one thread; rounds take turns, and the median
and the range of the CPU time are shown. First moments are Gaussian. Second moments are lognormal,
their logarithm of standard deviation 3. The error is ||read back - x|| / ||x||; "to zero" is the
share of second moments that are read back as 0, each a division by epsilon. Temporaries are the
most that storing or reading allocates at a time, the result included.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import describe
from benchmarks.measure import peak_allocated, timed
from subspan.linalg.codebooks import dynamic_codebook, linear_codebook
from subspan.linalg.quantise import dequantise_blocks, quantise_blocks
from subspan.linalg.row_affine import dequantise_rows, quantise_rows

_COLUMNS = 1024


@dataclass(frozen=True)
class Codec:
    """How one tensor is stored, in place where the library can, and read back."""

    store: Callable[[], object]
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Format:
    """A format of one package; `open` makes a codec for a tensor, signed or not."""

    package: str
    name: str
    bytes: float
    open: Callable[[Tensor, bool], Codec]


def _cast(dtype: torch.dtype) -> Callable[[Tensor, bool], Codec]:
    def make(x: Tensor, signed: bool) -> Codec:
        kept, out = torch.empty_like(x, dtype=dtype), torch.empty_like(x)
        return Codec(lambda: kept.copy_(x), lambda: out.copy_(kept))

    return make


def _blocks(
    codebook: Callable[[bool, int], Tensor], bits: int, block: int, **options: bool
) -> Callable[[Tensor, bool], Codec]:
    def make(x: Tensor, signed: bool) -> Codec:
        book, out = codebook(signed, bits), torch.empty_like(x)
        packed = options.get("packed", False)
        codes, scale = quantise_blocks(x, book, block, **options)
        return Codec(
            lambda: quantise_blocks(x, book, block, codes=codes, scale=scale, **options),
            lambda: dequantise_blocks(codes, scale, book, block, packed=packed, out=out),
        )

    return make


def _rows(bits: int) -> Callable[[Tensor, bool], Codec]:
    def make(x: Tensor, signed: bool) -> Codec:
        matrix = x.view(-1, _COLUMNS)
        kept, out = quantise_rows(matrix, bits), torch.empty_like(matrix)
        return Codec(
            lambda: quantise_rows(matrix, bits, out=kept),
            lambda: dequantise_rows(*kept, _COLUMNS, bits, out=out),
        )

    return make


def _bucketize(x: Tensor, signed: bool) -> Codec:
    """The shortest way to write the 8-bit dynamic map in torch: whole-tensor operations."""
    book, kept = dynamic_codebook(signed), {}
    middles = (book[1:] + book[:-1]) / 2

    def store() -> None:
        blocks = x.view(-1, 256)
        scale = blocks.abs().amax(1, keepdim=True)
        codes = torch.bucketize(blocks / scale, middles, out_int32=True).to(torch.uint8)
        kept["codes"], kept["scale"] = codes, scale

    return Codec(store, lambda: (book[kept["codes"].int()] * kept["scale"]).view(-1))


def _bitsandbytes(x: Tensor, signed: bool) -> Codec:
    book, kept = dynamic_codebook(signed), {}
    calls = torch.ops.bitsandbytes

    def store() -> None:
        kept["codes"], kept["scale"] = calls.quantize_blockwise(x, book, 256)

    def read() -> Tensor:
        return calls.dequantize_blockwise(kept["codes"], kept["scale"], book, 256, torch.float32)

    return Codec(store, read)


def _torchao(bits: int, compiled: bool = False) -> Callable[[Tensor, bool], Codec]:
    """The state tensors of its optimizers, whose step it compiles."""

    def make(x: Tensor, signed: bool) -> Codec:
        module: Any = importlib.import_module(f"torchao.optim.subclass_{bits}bit")
        state = getattr(module, f"OptimState{bits}bit").zeros(x.shape, signed=signed)
        store, read = type(state).copy_, type(state).dequantize
        if compiled:
            store, read = (torch.compile(call, fullgraph=True) for call in (store, read))
        return Codec(lambda: store(state, x), lambda: read(state))

    return make


def formats() -> list[Format]:
    """Ours, torch's own casts for comparison, and what is installed."""
    dynamic, linear = dynamic_codebook, linear_codebook
    four = _blocks(lambda signed, bits: (dynamic if signed else linear)(signed, bits), 4, 128,
                   packed=True)  # fmt: skip
    rows = [
        Format("torch", "float32", 4, _cast(torch.float32)),
        Format("torch", "bfloat16", 2, _cast(torch.bfloat16)),
        Format("subspan", "8-bit dynamic", 1 + 4 / 256, _blocks(dynamic, 8, 256)),
        Format("subspan", "8-bit dynamic, grid", 1 + 4 / 256, _blocks(dynamic, 8, 256, grid=True)),
        Format("torch", "8-bit dynamic, bucketize", 1 + 4 / 256, _bucketize),
        Format("bitsandbytes", "8-bit dynamic", 1 + 4 / 256, _bitsandbytes),
        Format("torchao", "8-bit dynamic", 1 + 4 / 256, _torchao(8)),
        Format("torchao", "8-bit dynamic, compiled", 1 + 4 / 256, _torchao(8, compiled=True)),
        Format("subspan", "8-bit linear", 1 + 4 / 256, _blocks(linear, 8, 256)),
        Format("subspan", "4-bit dynamic; linear", 0.5 + 4 / 128, four),
        Format("torchao", "4-bit dynamic; linear", 0.5 + 4 / 128, _torchao(4)),
        Format("torchao", "4-bit, compiled", 0.5 + 4 / 128, _torchao(4, compiled=True)),
        Format("subspan", "8-bit rows, affine", 1 + 8 / _COLUMNS, _rows(8)),
        Format("subspan", "4-bit rows, affine", 0.5 + 8 / _COLUMNS, _rows(4)),
    ]
    missing = {name for name in ("bitsandbytes", "torchao") if not _importable(name)}
    return [row for row in rows if row.package not in missing]


def _importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def _error(x: Tensor, back: Tensor) -> float:
    return float((back.view(-1).double() - x.double()).norm() / x.double().norm())


def _nanoseconds(seconds: list[float], elements: int) -> str:
    scaled = [1e9 * s / elements for s in seconds]
    return f"{statistics.median(scaled):.2f} [{min(scaled):.2f}-{max(scaled):.2f}]"


def measure(elements: int, rounds: int) -> list[list[str]]:
    """Rows of the table."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(elements, generator=generator)
    second = torch.exp(3 * torch.randn(elements, generator=generator))
    entries = formats()
    codecs = [entry.open(first, True) for entry in entries]
    spent: list[tuple[list[float], list[float]]] = [([], []) for _ in entries]
    for turn in range(rounds + 1):
        for codec, (store, read) in zip(codecs, spent, strict=True):
            seconds = timed(codec.store).cpu, timed(codec.read).cpu
            if turn:  # the first builds tables and maps memory
                store.append(seconds[0])
                read.append(seconds[1])
    rows = []
    for entry, codec, (store, read) in zip(entries, codecs, spent, strict=True):
        peak = max(peak_allocated(codec.store), peak_allocated(codec.read))
        positive = entry.open(second, False)
        positive.store()
        back = positive.read()
        rows.append(
            [
                f"{entry.package} {entry.name}",
                f"{entry.bytes:.3f}",
                _nanoseconds(store, elements),
                _nanoseconds(read, elements),
                f"{peak / elements:.1f}",
                f"{_error(first, codec.read()):.4f}",
                f"{_error(second, back):.4f}",
                f"{float((back == 0).double().mean()):.1e}",
            ]
        )
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.storage", description=__doc__)
    parser.add_argument("--elements", type=int, default=1 << 22, help="a multiple of 1024")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    machine = describe()
    rows = measure(options.elements, options.rounds)
    packages = dict.fromkeys(["subspan", "torch", *(entry.package for entry in formats())])
    versions = ", ".join(f"{name} {version(name).split('+')[0]}" for name in packages)
    print(f"Date: {machine['date']}. Command: `{' '.join([parser.prog, *sys.argv[1:]])}`.")
    print(
        f"Machine: {machine['cpu']}, {machine['cores']} cores, {machine['system']}; one thread; "
        f"malloc settings: {machine['malloc']}; load average before the run {machine['load']:.1f}."
    )
    print(f"Versions: {versions}. {options.elements} elements.\n")
    header = ["format", "bytes", "store, ns", "read, ns", "temporaries, bytes"]
    header += ["error, first moments", "error, second moments", "to zero"]
    for line in [header, ["---"] * len(header), *rows]:
        print("| " + " | ".join(line) + " |")


if __name__ == "__main__":
    main()
