"""Runs the command in several processes, which torchrun's own launcher starts, but as functions: imports are done once.

Accelerate does not shard on CPUs, so a process that is to be sharded has it believe that there are GPUs.
"""

import os
import signal
import sys
import threading
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from processes import start_forkserver
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from scalora.cli import app
from scalora.engine import ScaLora
from scalora.runs import stopping
from scalora.runs.measure import StepClock


def launch(folder, *words, processes=2, shards=False, seconds=120, before=None, environment=None):
    """Run `scalora WORDS` in several processes.

    Args:
        folder: folder for what they print.
        words: the command's words.
        processes: number of processes.
        shards: whether Accelerate shall shard where it is told to.
        seconds: after which they are killed.
        before: a function of this module or another that can be imported, called in each process first.
        environment: variables to set in each process.

    Returns:
        The launcher's error, None if there was none; what each process wrote to standard output; to standard error.
    """
    logs = Path(folder)
    logs.mkdir(parents=True, exist_ok=True)
    start_forkserver()
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        run_id="test", max_restarts=0, monitor_interval=0.1, start_method="forkserver",
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=Std.ALL),
    )  # fmt: skip
    error = None
    try:
        elastic_launch(config, process)([str(word) for word in words], shards, seconds, before, environment or {})
    except ChildFailedError as failed:
        error = failed
    (last,) = logs.glob("*/attempt_0")
    printed = {
        kind: [_read(last / str(rank) / f"{kind}.log") for rank in range(processes)] for kind in ("stdout", "stderr")
    }
    return error, printed["stdout"], printed["stderr"]


def _read(file):
    # A process that is ended because another one failed may not have got as far as to open it.
    return file.read_text() if file.exists() else ""


def start_deepspeed():
    """Have DeepSpeed connect the processes, as the Trainer's arguments do before a model is loaded, but not on CPUs."""
    import deepspeed

    deepspeed.init_distributed("gloo", verbose=False)


def kill_after_step():
    """End a process by SIGKILL after a step, by the variables KILL_RANK and KILL_STEP."""
    _kill_before(StepClock, "on_step_end", lambda self, args, state, *_: state.global_step)


def kill_while_saving():
    """End a process by SIGKILL while the checkpoint of a step lacks ScaLoRA's state only."""
    _kill_before(ScaLora, "save", lambda self, *_: self.step)


def end_after_step():
    """Ask a process to end (SIGTERM) after a step."""
    _kill_before(StepClock, "on_step_end", lambda self, args, state, *_: state.global_step, signal.SIGTERM)


def end_while_it_waits():
    """Ask a process to end (SIGTERM) while it waits, after a step, for another that never comes."""
    stopping._GRACE_SECONDS = 0.5

    def wait(signal_number):
        threading.Timer(0.5, os.kill, (os.getpid(), signal_number)).start()
        # As in a collective, no handler of Python's gets its turn.
        torch.distributed.FileStore(os.environ["KILL_FILE"], 1).wait(["never"], timedelta(seconds=100))

    _kill_before(StepClock, "on_step_end", lambda self, args, state, *_: state.global_step, signal.SIGTERM, wait)


def _kill_before(owner, name, step_of, signal_number=signal.SIGKILL, kill=None):
    kill = kill or (lambda number: os.kill(os.getpid(), number))
    method = getattr(owner, name)

    def killed(self, *args, **kwargs):
        if (os.environ["RANK"], str(step_of(self, *args))) == (os.environ["KILL_RANK"], os.environ["KILL_STEP"]):
            kill(signal_number)
        return method(self, *args, **kwargs)

    setattr(owner, name, killed)


def process(words, shards, seconds, before, environment):
    """What each process does."""
    threading.Thread(target=_die, args=(seconds,), daemon=True).start()
    os.environ |= environment
    torch.set_num_threads(1)
    if shards:
        _have_accelerate_shard()
    if before is not None:
        before()
    sys.argv = ["scalora", *words]
    try:
        app()
    except SystemExit as end:
        if end.code:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code)  # raised further, it would be an error of multiprocessing


def _die(seconds):
    threading.Event().wait(seconds)
    os.kill(os.getpid(), signal.SIGKILL)


def _have_accelerate_shard():
    make = PartialState.__init__

    def with_gpus(self, *args, **kwargs):
        make(self, *args, **kwargs)
        if self.distributed_type is DistributedType.MULTI_CPU:
            self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = with_gpus
