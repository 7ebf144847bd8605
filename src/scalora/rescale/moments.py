"""Refuses steps at moments when no rescale can come before them: in a backward pass, or captured in a CUDA graph."""

from __future__ import annotations

import torch

from scalora.rescale.optimizers import UnsupportedOptimizerError


def in_backward_pass() -> bool:
    """Whether autograd is running one in this thread, such as when a hook of a parameter is called."""
    return torch._C._current_graph_task_id() != -1  # has no public name; checked with torch 2.13


def is_being_captured(device: torch.device) -> bool:
    """Whether what is computed on a device goes into a CUDA graph.

    Args:
        device: the device.
    """
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def refuse_in_backward_pass(optimizer: str) -> None:
    """Refuse a step that a hook takes as soon as a parameter has its gradient.

    Args:
        optimizer: name of the optimizer's class.

    Raises:
        UnsupportedOptimizerError: always.
    """
    raise UnsupportedOptimizerError(
        f"{optimizer}.step() is called by a hook during the backward pass (gradient release), when the gradients that "
        "a rescale needs are not all there: call it after backward()"
    )


def check_moment(optimizer: str, device: torch.device) -> None:
    """Check that a rescale can come before a step that an optimizer is about to take.

    Args:
        optimizer: name of the optimizer's class.
        device: the device of its parameters.

    Raises:
        UnsupportedOptimizerError: it can't.
    """
    if in_backward_pass():
        refuse_in_backward_pass(optimizer)
    if is_being_captured(device):
        raise UnsupportedOptimizerError(
            f"{optimizer}.step() is being captured in a CUDA graph, whose replays call no hooks, so that ScaLoRA would "
            "neither count steps nor choose those with a rescale: capture the forward and backward passes alone "
            "(torch.cuda.make_graphed_callables), and call step() outside of the graph"
        )
