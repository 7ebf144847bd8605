"""The state dict of an optimizer as one process has it, whatever the parameters' parts in each process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from scalora.parallel.shards import state_split_as
from scalora.parallel.zero import Zero
from scalora.rescale.optimizers import Kind


def optimizer_state(optimizer: Optimizer, zero: Zero | None) -> dict[str, Any]:
    """An optimizer's state dict, with what is here of tensors that are divided over processes.

    Args:
        optimizer: the optimizer itself.
        zero: what DeepSpeed's ZeRO has made of it; None without.
    """
    return optimizer.state_dict() if zero is None else zero.state_dict()


def load_optimizer_state(
    state: Mapping[str, Any], optimizer: Optimizer, zero: Zero | None, kinds: Mapping[str, Kind]
) -> None:
    """Restore an optimizer's state.

    Args:
        state: the state dict, with whole tensors; may be of the same parameters with or without DeepSpeed's ZeRO.
        optimizer: the optimizer itself.
        zero: what DeepSpeed's ZeRO has made of it; None without.
        kinds: how each entry of its state depends on the gradients.

    Raises:
        AttributeError: the state does not fit the optimizer. Nothing has been changed then.
        KeyError: as above.
        TypeError: as above.
        ValueError: as above.
    """
    if zero is not None:
        zero.load_state_dict(state)
    else:
        optimizer.load_state_dict(state_split_as(_with_groups_of(state, optimizer), optimizer, kinds))


def _with_groups_of(state: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """A state with the groups and parameters that DeepSpeed drops: those that are frozen, and groups without others."""
    saved = [group for group in state["param_groups"] if group["params"]]
    own = [[p.requires_grad for p in group["params"]] for group in optimizer.param_groups]
    dropped = [list(filter(None, trained)) for trained in own]
    same = [len(group["params"]) for group in state["param_groups"]] == list(map(len, own))
    if same or [len(group["params"]) for group in saved] != [len(trained) for trained in dropped if trained]:
        return dict(state)  # torch says so if it does not fit
    numbers: dict[int, int] = {}
    groups, with_trained, count = [], iter(saved), 0
    for trained, group in zip(own, optimizer.param_groups, strict=True):
        of_saved = next(with_trained) if any(trained) else group
        own_numbers = range(count, count + len(trained))
        count += len(trained)
        if any(trained):
            kept = [number for number, is_trained in zip(own_numbers, trained, strict=True) if is_trained]
            numbers.update(zip(of_saved["params"], kept, strict=True))
        groups.append({**of_saved, "params": list(own_numbers)})
    return {"state": {numbers[old]: entries for old, entries in state["state"].items()}, "param_groups": groups}
