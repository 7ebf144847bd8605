"""The processes of a data-parallel run: which one this is, and what has to be the same in all of them.

Everything that is computed from one process's data, or drawn by its generators, differs between processes until it is
averaged or taken from the first one. A difference in a remainder stays: nothing sends remainders around.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


def process_rank() -> int:
    """The number of this process among those of a run, from 0; 0 without `torch.distributed`."""
    return dist.get_rank() if have_a_group() else 0


def process_count() -> int:
    """The number of processes of a run; 1 without `torch.distributed`."""
    return dist.get_world_size() if have_a_group() else 1


def require_process_group(what: str) -> None:
    """Check that processes that a launcher has started for one run can talk to each other.

    Args:
        what: what needs them to, for the error message.

    Raises:
        RuntimeError: there are several processes, but no process group yet.
    """
    if not have_a_group() and (count := os.environ.get("WORLD_SIZE", "1")) not in ("", "0", "1"):
        raise RuntimeError(
            f"{what} must be the same in all {count} processes: call torch.distributed.init_process_group() before, or "
            "create the Trainer or its TrainingArguments first"
        )


@torch.no_grad()
def averaged(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor | None]:
    """The mean of tensors over all processes, as data-parallel training takes it of gradients.

    Args:
        tensors: tensors, or None for those that this process has not got, which then count as zeros.
        like: tensors of the same shapes, dtypes and devices.

    Returns:
        The means; None where no process has got a tensor.
    """
    if process_count() == 1:
        return list(tensors)
    present = torch.tensor([tensor is not None for tensor in tensors], dtype=torch.int32)
    there = _on_backend(present)
    dist.all_reduce(there, dist.ReduceOp.MAX)
    means: list[Tensor | None] = []
    for tensor, reference, found in zip(tensors, like, there.tolist(), strict=True):
        if not found:
            means.append(None)
            continue
        summand = torch.zeros_like(reference) if tensor is None else tensor
        # In float32 at least: a sum in float16 could overflow.
        total = _on_backend(summand.to(torch.promote_types(summand.dtype, torch.float32), copy=True).contiguous())
        dist.all_reduce(total)
        means.append((total / process_count()).to(reference))
    return means


@torch.no_grad()
def take_from_first(tensors: Sequence[Tensor]) -> None:
    """Overwrite tensors with those of the first process.

    Args:
        tensors: tensors of the same shapes and dtypes in all processes; modified.
    """
    if process_count() == 1:
        return
    for tensor in tensors:
        sent = _on_backend(tensor.detach().contiguous())
        dist.broadcast(sent, 0)
        tensor.copy_(sent)


def smallest(value: Tensor) -> Tensor:
    """The smallest of a scalar over all processes.

    Args:
        value: a scalar on the device that the processes communicate from; not modified.
    """
    value = value.clone()
    if have_a_group():
        dist.all_reduce(value, op=dist.ReduceOp.MIN)
    return value


def mean(value: Tensor) -> Tensor:
    """The mean of a scalar over all processes.

    Args:
        value: a scalar on the device that the processes communicate from; not modified.
    """
    value = value.clone()
    if have_a_group():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


@contextmanager
def failing_together(kind: type[Exception]) -> Iterator[None]:
    """Context manager after which all processes go on, or all raise. All must enter it.

    A process that goes on where another has raised would wait for it forever at the next collective.

    Args:
        kind: what is raised where another process has failed. It itself raises its own error.

    Raises:
        Exception: what the context raised; or one of the class `kind`, with the first other process that failed.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    if process_count() > 1:
        failures: list[str | None] = [None] * process_count()
        dist.all_gather_object(failures, None if own is None else str(own))
        failed = next((rank for rank, failure in enumerate(failures) if failure is not None), None)
        if own is None and failed is not None:
            raise kind(f"process {failed} of {len(failures)} failed: {failures[failed]}")
    if own is not None:
        raise own


def have_a_group() -> bool:
    """Whether this process belongs to a group of `torch.distributed`."""
    return dist.is_available() and dist.is_initialized()


def _on_backend(tensor: Tensor) -> Tensor:
    """A tensor where the backend of the processes can reach it: NCCL sends nothing from the CPU."""
    return tensor.cuda() if dist.get_backend() == "nccl" and tensor.is_cpu else tensor
