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
    "torch_adamw", "galore_*", "fira_*", "frugal_*", "flora*", "apollo_*", "ldadamw_*",
    "qgalore_sim_*", "qgalore_projector_*", "coap_*", "subtrackpp_*", "ref_*", "osd_*", "dct_*",
    "trion_*", "snsm_*", "auon", "hybrid_auon*", "muon_*", "swats_*", "badam_*", "lbp_wht_linear",
    "inputs_conv",
)  # fmt: skip
PREFIXES = (
    "weight/", "basis/", "basis_float/", "basis_q/", "accgrad/", "draw/", "uniform/",
    "basis_full/",
)  # fmt: skip
# Kept as they are.
WHOLE = ("inputs", "inputs_conv", "lbp_wht_linear")


def _is_error(path: Path, name: str) -> bool:
    """Quantised error feedback is compared itself: weights depend on it too sensitively."""
    return path.stem.startswith(("dct_adamw_ef8", "dct_adamw_ef4")) and "/error_feedback/" in name


def main(source: Path, target: Path) -> None:
    """Write one reduced file per kept recording, and the inputs."""
    for path in sorted(source.glob("*.safetensors")):
        kept = any(fnmatch.fnmatch(path.stem, pattern) for pattern in KEPT)
        if not kept and path.stem != "inputs":
            continue
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            if path.stem not in WHOLE:
                names = [n for n in names if n.startswith(PREFIXES) or _is_error(path, n)]
            if path.stem.startswith("ldadamw"):
                names = [name for name in names if not name.startswith("basis/")]
            tensors = {name: file.get_tensor(name) for name in names}
            metadata = file.metadata()
        for name, tensor in tensors.items():
            if tensor.dtype in (torch.int64, torch.int32):
                tensors[name] = tensor.to(torch.int16)
            elif name.startswith("basis_q/"):
                tensors[name] = tensor.to(torch.uint8)
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            target / path.name,
            metadata,
        )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(__file__).parent)
