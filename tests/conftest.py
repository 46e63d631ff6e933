"""One thread per test process: results do not depend on the machine's cores, and parallel workers do not fight."""

import torch

torch.set_num_threads(1)
