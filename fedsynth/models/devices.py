"""The devices of models: threads, the GPUs that this process sees, and their memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch


def one_thread() -> None:
    """Sets one thread for this process: two per worker on a shared machine run at half the speed of one."""
    torch.set_num_threads(1)


@contextmanager
def as_a_worker() -> Iterator[None]:
    """One thread for the work within, as in a worker. Two threads of a small model mostly wait for each other."""
    threads = torch.get_num_threads()
    one_thread()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def device() -> torch.device:
    """A CUDA GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def gpus() -> int:
    """Number of CUDA GPUs that this process sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def gpu_names() -> list[str]:
    """Names of the CUDA GPUs that this process sees."""
    return [torch.cuda.get_device_name(number) for number in range(gpus())]


def free_memory(where: torch.device) -> int:
    """Bytes of a device that are free now."""
    if where.type == "cuda":
        return int(torch.cuda.mem_get_info(where)[0])
    return int(psutil.virtual_memory().available)


_CUDA_CONTEXT = 5e8  # bytes that a process takes on a GPU beside its tensors


def gpu_memory() -> tuple[float, float]:
    """The most bytes of a GPU that this process has held, and the bytes that are free now."""
    return torch.cuda.max_memory_reserved() + _CUDA_CONTEXT, torch.cuda.mem_get_info()[0]
