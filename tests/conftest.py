"""One thread per process: two on a shared machine run at half the speed of one."""

import torch

torch.set_num_threads(1)
