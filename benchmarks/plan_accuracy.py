"""Planned memory against one real step in a clean process, for several models and methods.

    python -m benchmarks.plan_accuracy

Prints Markdown. Weights, gradients, states and bases must be equal to the byte; the bar for the
resident peak above the process without the model is 5 %.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from subspan.plan import ModelSpec, Settings, measure

ONCE = {"update_in_backward": True, "clipping": "each"}


def _folder(root: Path, name: str) -> str:
    """A configuration of about a hundred million parameters of another family."""
    from transformers import GPT2Config, Qwen2Config

    configs = {
        "gpt2": lambda: GPT2Config(),
        "qwen2": lambda: Qwen2Config(
            hidden_size=512,
            intermediate_size=1408,
            num_hidden_layers=12,
            num_attention_heads=8,
            num_key_value_heads=2,
            vocab_size=50000,
            tie_word_embeddings=True,
        ),
    }
    configs[name]().save_pretrained(root / name)
    return str(root / name)


def pairs(root: Path) -> list[tuple[str, Settings]]:
    """What is compared."""

    def row(
        source: str, method: str, dtype: Any, options: dict[str, Any], **way: Any
    ) -> tuple[str, Settings]:
        named = source.startswith("llama")
        spec = ModelSpec(source if named else _folder(root, source), dtype=dtype)
        words = ", ".join([dtype, *(f"{k}={v}" for k, v in (options | way).items())])
        return f"{source}, {method} ({words})", Settings(spec, method, options, device="cpu", **way)

    galore = {"rank": 128, "storage": "int8"}
    return [
        row("llama-60m", "adamw", "float32", {}, batch_size=4),
        row("llama-60m", "galore", "bfloat16", galore, batch_size=4, **ONCE),
        row("llama-130m", "fira", "bfloat16", {"rank": 256}, batch_size=2, checkpointing="full"),
        row("gpt2", "apollo", "float32", {"rank": 192}, batch_size=2),
        row("qwen2", "muon", "float32", {}, batch_size=2, accumulation=2),
        row("llama-60m", "adamw", "bfloat16-mixed", {}, batch_size=4),
        row("llama-60m", "badam", "float32", {}, batch_size=4),
    ]


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    print("| model, method | parts equal | planned peak, MB | measured, MB | difference |")
    print("| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for words, settings in pairs(Path(folder)):
            compared = measure(settings)
            rows = compared.rows()
            exact = [planned == seen for _, planned, seen, must in rows if must]
            planned, seen = next((p, s) for name, p, s, _ in rows if name == "peak")
            equal = f"{sum(exact)} of {len(exact)}"
            gap = f"{100 * (seen / planned - 1):+.1f} %"
            print(
                f"| {words} | {equal} | {planned / 1e6:.1f} | {seen / 1e6:.1f} | {gap} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
