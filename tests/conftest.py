"""What all tests share."""

import os

import torch

SESSION = "FEDSYNTH_TEST_SESSION"  # inherited by whatever this test process starts: another one may run beside it
os.environ[SESSION] = str(os.getpid())
torch.set_num_threads(1)  # two on a shared machine run at half the speed of one
