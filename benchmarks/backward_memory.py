"""Peak memory of a whole training step, ordinary and with updates inside the backward pass.

    python -m benchmarks.backward_memory [--tokens 32] [--method galore]

Builds LLaMA-60M (random weights), takes two steps so that all states exist, and prints as Markdown
what torch's allocator hands out at most during the third: forward pass, backward pass and update,
above weights and states. The bar is a peak that is lower by at least 85 % of all gradients' bytes.
Activations grow with the number of tokens and are the same in all modes, so a step of few tokens
shows what the gradients cost.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

import subspan.optim as optim
from benchmarks.machine import describe
from benchmarks.measure import peak_allocated

MODES = {
    "ordinary steps": None,
    "in the backward pass": {"model": False},
    "in the backward pass, embedding and head by rows": {"model": True},
}


def build(tokens: int) -> nn.Module:
    """LLaMA-60M with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        vocab_size=32000,
        max_position_embeddings=max(tokens, 32),
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def peak(method: str, tokens: int, mode: dict[str, bool] | None) -> tuple[int, int]:
    """(peak bytes of a step above weights and states, bytes of all gradients)."""
    model = build(tokens)
    optimizer = optim.for_model(model, method, lr=1e-4, rank=128, update_proj_gap=1000)
    if mode is not None:
        optimizer.attach_to_backward(model if mode["model"] else None)
    ids = torch.randint(0, 32000, (1, tokens), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    step()
    gradients = sum(p.numel() * p.element_size() for p in model.parameters())
    return peak_allocated(step), gradients


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--method", default="galore")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    machine = describe()
    print(f"{machine['date']}, {machine['cpu']}, torch {torch.__version__}, one thread")
    print(f"\nLLaMA-60M, {arguments.method}, rank 128, float32, {arguments.tokens} tokens\n")
    print("| step | peak above weights and states, MB | saved, share of the gradients |")
    print("| --- | --- | --- |")
    base = None
    for name, mode in MODES.items():
        used, gradients = peak(arguments.method, arguments.tokens, mode)
        base = used if base is None else base
        saved = "" if base == used else f"{(base - used) / gradients:.0%}"
        print(f"| {name} | {used / 1e6:.1f} | {saved} |")
    print(f"\nAll gradients: {gradients / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
