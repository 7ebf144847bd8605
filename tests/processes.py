"""What the tests of several processes share: starting them, the model that they train, and what they send."""

import os
import resource
import signal
import socket
import sys
import time
from contextlib import contextmanager
from multiprocessing import forkserver

import torch
from models import Mixed
from torch import multiprocessing, nn
from torch.utils._python_dispatch import TorchDispatchMode

BATCH = 8


class Layers(nn.Module):
    """`Mixed`, whose rows no number of processes divides, and one more layer."""

    def __init__(self):
        super().__init__()
        self.mixed = Mixed(vocabulary=21, width=11)
        self.extra = nn.Linear(3, 5)

    def forward(self, tokens):
        return self.extra(torch.tanh(self.mixed(tokens)))


def data(index):
    generator = torch.Generator().manual_seed(index)
    return torch.randint(0, 21, (BATCH, 6), generator=generator), torch.randn(BATCH, 6, 5, generator=generator)


class Collectives(TorchDispatchMode):
    """Collects the names of collectives, and the bytes that each of them leaves in a process."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.name():
            tensors = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            self.seen.append((func.name().split("::")[1].split(".")[0], sum(t.nbytes for t in tensors)))
        return func(*args, **(kwargs or {}))


@contextmanager
def full_disk(here):
    """Context manager in which a process can write files of a hundred bytes at most, if it is to be `here`."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if here:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def start_forkserver():
    """Start the process that processes are forked from, which has imported what takes longest: once in a worker."""
    forkserver.set_forkserver_preload(["preloaded"])
    earlier = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # all that it looks for modules in, up to Python 3.12
    try:
        forkserver.ensure_running()
    finally:
        if earlier is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = earlier


def results_of(processes, folder, work, *, seconds=150):
    """What processes have saved, each under its number, that do some work within so many seconds."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    start_forkserver()
    started = multiprocessing.start_processes(
        work, (processes, str(folder), port), nprocs=processes, join=False, start_method="forkserver"
    )
    deadline = time.monotonic() + seconds
    try:
        while not started.join(timeout=1):
            assert time.monotonic() < deadline, f"{processes} processes hang"
    finally:
        for child in started.processes:
            child.kill()
    return [torch.load(folder / f"{processes}-{rank}.pt", weights_only=False) for rank in range(processes)]


def worst(found, wanted):
    assert found.keys() == wanted.keys()
    return max(((found[name] - wanted[name]).norm() / wanted[name].norm()).item() for name in wanted)
