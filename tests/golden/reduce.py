"""Cut the recorded trajectories of the official implementations down to what the fidelity tests
compare.

    python tests/golden/reduce.py FOLDER_WITH_THE_FULL_RECORDINGS

Kept are the weights at every recorded step, the bases (or indices, or activity flags) as float32 or
int16, and the metadata "spec". `inputs.safetensors` holds the initial weights and the 40 gradients
that all recordings share.
"""

from __future__ import annotations

import fnmatch
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

KEPT = (
    "torch_adamw", "galore_adamw_*", "galore_adafactor*", "galore_adamw8bit_states32", "fira_*",
    "frugal_*", "flora", "flora_scaleparam", "flora_accumulation", "apollo_*", "ldadamw_*",
)  # fmt: skip


def main(source: Path, target: Path) -> None:
    """Write one reduced file per kept recording, and the inputs."""
    for path in sorted(source.glob("*.safetensors")):
        kept = any(fnmatch.fnmatch(path.stem, pattern) for pattern in KEPT)
        if not kept and path.stem != "inputs":
            continue
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            if path.stem != "inputs":
                names = [n for n in names if n.startswith(("weight/", "basis/", "accgrad/"))]
            if path.stem.startswith("ldadamw"):
                names = [name for name in names if not name.startswith("basis/")]
            tensors = {name: file.get_tensor(name) for name in names}
            metadata = file.metadata()
        for name, tensor in tensors.items():
            if tensor.dtype == torch.int64:
                tensors[name] = tensor.to(torch.int16)
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            target / path.name,
            metadata,
        )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(__file__).parent)
