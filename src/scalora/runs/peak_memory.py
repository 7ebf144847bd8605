"""Peak memory of the current process."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch


def peak_memory_bytes(*, cuda: bool) -> int:
    """Peak memory of the current process so far, in bytes.

    Args:
        cuda: True: memory that torch has allocated on the CUDA device. False: resident memory of the whole process.
    """
    if cuda:
        return torch.cuda.max_memory_allocated()
    if (status := Path("/proc/self/status")).is_file():
        # Not getrusage, in which a process inherits the peak of its parent.
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
