"""What all tests share."""

import os
import signal

import torch

SESSION = "FEDSYNTH_TEST_SESSION"  # inherited by whatever this test process starts: another one may run beside it
os.environ[SESSION] = str(os.getpid())
torch.set_num_threads(1)  # two on a shared machine run at half the speed of one
# A shell without job control has what it starts in the background ignore Ctrl-C, and so would all that is started here.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
