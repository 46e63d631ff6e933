"""One thread per test process: the same results on any machine, and workers that do not fight."""

import torch

torch.set_num_threads(1)
