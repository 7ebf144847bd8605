"""The peak memory of a process so far."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch


def peak_memory_bytes(*, cuda: bool) -> int:
    """What torch took at the most on the CUDA device, or what the whole process had resident.

    Args:
        cuda: whether the device is asked rather than the process.
    """
    if cuda:
        return torch.cuda.max_memory_allocated()
    if (status := Path("/proc/self/status")).is_file():
        # Not getrusage, whose peak a process inherits from the one that started it.
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
