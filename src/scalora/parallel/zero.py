"""DeepSpeed's ZeRO: the one file that knows what its optimizers keep private. Imports nothing of DeepSpeed.

They hold float32 copies of the trained parameters, of which every process has a run, as one flat tensor for each group;
the optimizer inside steps these, group after group, once gradients have been averaged, unscaled and clipped, and not at
all after an overflow. After its step they are copied back to the model, in all processes. With ZeRO-3 the model's
parameters are divided too, the frozen ones included. Checked with DeepSpeed 0.19.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from scalora.model.adapters import LoraPair, UnsupportedLayerError, refuse
from scalora.model.layers import is_partitioned
from scalora.parallel.flat import Cut, Run
from scalora.parallel.shards import Axis
from scalora.rescale.optimizers import Kind, UnsupportedOptimizerError
from scalora.rescale.quantised_state import COMPANIONS

_VERSION = "0.19"

_BOTH = ("optimizer", "dp_process_group", "master_weights_and_grads_dtype", "torch_autocast_gradscaler", "zenflow")
_OF_12 = (
    *("bit16_groups", "round_robin_bit16_groups", "round_robin_bit16_meta", "round_robin_bit16_offsets"),
    *("single_partition_of_fp32_groups", "partition_size", "has_moe_layers", "model_parallel_world_size"),
    "update_lp_params",
)
_OF_3 = (
    *("fp16_groups", "fp16_partitioned_groups_flat", "fp32_partitioned_groups_flat", "grad_position", "get_param_id"),
    *("sub_group_to_group_id", "sub_group_process_groups", "persistent_parameters", "empty_partition_cache"),
    *(
        "swap_optimizer",
        "params_in_nvme_and_cpu",
        "offload_optimizer",
        "partial_offload",
        "use_muon",
        "zero_hpz_partition_size",
    ),
    *("zero_quantized_nontrainable_weights", "parameter_offload", "model_parallel_group"),
    "_reassign_or_swap_out_partitioned_parameters",
)
_OF_PARAMETERS = ("ds_tensor", "ds_shape", "ds_numel", "ds_process_group", "partition_numel", "all_gather", "partition")
_CLASSES = {"DeepSpeedZeroOptimizer": _OF_12, "DeepSpeedZeroOptimizer_Stage3": _OF_3}

_USE = "use ZeRO stage 1, 2 or 3 without it"

# What makes it impossible to carry a rescale over, or has not been tried: how to tell, what it is, and what to do.
_Refusal = tuple[Callable[[Any], Any], str, str]
_REFUSED: dict[str, tuple[_Refusal, ...]] = {
    "DeepSpeedZeroOptimizer": (
        (lambda zero: zero.has_moe_layers, "groups of experts (MoE)", _USE),
        (lambda zero: zero.model_parallel_world_size > 1, "tensor or pipeline parallelism (mpu)", _USE),
    ),
    "DeepSpeedZeroOptimizer_Stage3": (
        (lambda zero: zero.swap_optimizer, "the optimizer on NVMe (offload_optimizer)", "offload to the CPU"),
        (lambda zero: zero.params_in_nvme_and_cpu, "parameters on NVMe (offload_param)", "offload to the CPU"),
        (
            lambda zero: zero.offload_optimizer and zero.partial_offload != 1,
            "an optimizer that is offloaded in part (ratio)",
            "set offload_optimizer's ratio to 1",
        ),
        (lambda zero: zero.zero_hpz_partition_size > 1, "ZeRO++'s secondary copies of weights (hpZ)", _USE),
        (
            lambda zero: zero.zero_quantized_nontrainable_weights or zero.parameter_offload.zero_quantized_weights,
            "quantised weights (ZeRO++'s qwZ)",
            _USE,
        ),
        (lambda zero: zero.use_muon, "Muon", "use AdamW"),
        (
            lambda zero: {*map(_ranks, zero.sub_group_process_groups)} != {_ranks(zero.dp_process_group)},
            "groups of experts (MoE)",
            _USE,
        ),
        (lambda zero: zero.model_parallel_group is not None, "tensor or pipeline parallelism (mpu)", _USE),
    ),
}
_REFUSED_IN_BOTH: tuple[_Refusal, ...] = (
    (lambda zero: zero.zenflow, "ZenFlow", _USE),
    (
        lambda zero: "Muon" in type(zero.optimizer).__name__,
        "Muon, which works on matrices",
        "use AdamW",
    ),
    (
        lambda zero: zero.master_weights_and_grads_dtype != torch.float32,
        "copies of the weights in half precision, whose rounding errors a rescale would multiply",
        "leave out fp16_master_weights_and_grads and bf16_master_weights_and_grads",
    ),
    (lambda zero: zero.torch_autocast_gradscaler is not None, "torch_autocast in float16", "use bfloat16, or fp16"),
)


class _Group(NamedTuple):
    """Parameters that the optimizer steps together.

    Attributes:
        flat: this process's run of them, one after the other.
        number: number of the optimizer's parameter group.
        runs: the parameters in the order that the optimizer got them, with their runs.
    """

    flat: Tensor
    number: int
    runs: list[tuple[nn.Parameter, Run]]


class Zero:
    """What an engine needs of an optimizer of DeepSpeed's ZeRO.

    Args:
        zero: DeepSpeed's optimizer.

    Raises:
        UnsupportedOptimizerError: it is of another kind or version, or has settings that are not supported.

    Attributes:
        optimizer: the optimizer inside.
        defaults: the optimizer's.
        flats: what the optimizer inside steps.
    """

    def __init__(self, zero: Any) -> None:
        _check(zero)
        self._zero = zero
        self.optimizer: Optimizer = zero.optimizer
        self.defaults = self.optimizer.defaults
        self._groups = list(_groups_of_stage_3(zero) if _is_stage_3(zero) else _groups_of_stages_1_and_2(zero))
        self._runs = {id(p): run for group in self._groups for p, run in group.runs}
        self._param_groups = list(self.optimizer.param_groups)
        self.flats = [group.flat for group in self._groups]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups, with the model's parameters."""
        # While the optimizer steps one group, its list has that one alone.
        if len(self.optimizer.param_groups) == len(self._param_groups):
            self._param_groups = list(self.optimizer.param_groups)
        return [
            {**group, "params": [p for g in self._groups if g.number == number for p, _ in g.runs]}
            for number, group in enumerate(self._param_groups)
        ]

    def run_of(self, parameter: Tensor) -> Run:
        """The run that this process has of what the optimizer steps in place of a parameter.

        Args:
            parameter: a trained parameter of the model.
        """
        return self._runs[id(parameter)]

    def part_of(self, tensor: Tensor) -> Tensor | Run:
        """What there is of one of the model's tensors in this process: exactly, if it is trained.

        Args:
            tensor: a parameter of the model.
        """
        return self._runs.get(id(tensor)) or run_of_weight(tensor) or tensor.detach()

    def is_stepping(self, run: Run) -> bool:
        """Whether, in a hook of the optimizer's step, it is about to step a run, whose gradient is there then.

        Args:
            run: a run of a trained parameter.
        """
        return any(p is run.flat for group in self.optimizer.param_groups for p in group["params"])

    def begins_step(self) -> bool:
        """Whether, in a hook of the optimizer's step, this is the first group of a step."""
        return self.is_stepping(self._groups[0].runs[0][1])

    def check_pairs(self, pairs: list[LoraPair], kinds: Mapping[str, Kind]) -> None:
        """Check that layers and the optimizer's state can be rescaled.

        Args:
            pairs: the LoRA pairs of one model.
            kinds: how each entry of the state depends on the gradients.

        Raises:
            UnsupportedLayerError: a layer is no single matrix or shares its factors with another one, or the optimizer
                steps its two factors in different groups.
            UnsupportedOptimizerError: its state can't be cut into runs.
        """
        kind = type(self.optimizer)
        if any(key in COMPANIONS for key in kinds):
            raise UnsupportedOptimizerError(
                f"optimizer {kind.__name__} keeps its state in blocks of entries, which DeepSpeed's ZeRO cuts up: use "
                "torch.optim.AdamW"
            )
        if kind.__name__ == "PairAdamW":
            raise UnsupportedOptimizerError(
                "PairAdamW needs whole pairs of factors, which DeepSpeed's ZeRO cuts into runs of entries: use "
                "torch.optim.AdamW, or FSDP2"
            )
        coupled = getattr(self.optimizer, "adam_w_mode", True) in (False, 0)
        if coupled and any(group.get("weight_decay", 0) for group in self.param_groups):
            raise UnsupportedOptimizerError(
                f"DeepSpeed's {kind.__name__} with adam_w_mode=False adds its weight_decay to the gradient, so the "
                "state is not a function of the gradient alone: set weight_decay to 0, or use AdamW"
            )
        for pair in pairs:
            if not pair.is_matrix:
                refuse(
                    pair.name,
                    f"it is {'a stack of experts' if pair.experts > 1 else 'a convolution'}, whose factors DeepSpeed's "
                    "ZeRO cuts into runs of entries",
                    "train with DistributedDataParallel, or leave it out of the adapter",
                )
            if pair.twin is not None:
                refuse(
                    pair.name,
                    f"it shares its factors with {pair.twin.name!r}, and DeepSpeed's ZeRO cuts them into runs of "
                    "entries",
                    "train with DistributedDataParallel, or leave one of them out of the adapter",
                )
            runs = [self._runs.get(id(factor)) for factor in (pair.lora_A, pair.lora_B)]
            if runs[0] is not None and runs[1] is not None and runs[0].flat is not runs[1].flat:
                refuse(
                    pair.name,
                    "DeepSpeed's ZeRO steps lora_A and lora_B in different groups (as with LoRA+'s two learning rates) "
                    "or sub-groups, one after the other",
                    "put both in one parameter group, and leave sub_group_size out",
                )

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state dict as if it stepped the model's parameters, with runs in place of tensors."""
        numbers = iter(range(len(self._runs)))
        groups = [{**group, "params": [next(numbers) for _ in group["params"]]} for group in self.param_groups]
        state: dict[int, dict[str, Any]] = {}
        for number, (group, run) in enumerate(self._in_order()):
            entries = self.optimizer.state.get(group.flat, {})
            if entries:
                # A count of steps of its own for each parameter, because optimizers count in place.
                state[number] = {
                    key: run.of(value) if _is_divided(value, group.flat) else copy.deepcopy(value)
                    for key, value in entries.items()
                }
        return {"state": state, "param_groups": groups}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Args:
            state: the state, with whole tensors.

        Raises:
            ValueError: it is of other parameters.
        """
        saved_groups = [group for group in state["param_groups"] if group["params"]]
        own_groups = [group["params"] for group in self.param_groups]
        sizes = [len(group["params"]) for group in saved_groups]
        if sizes != list(map(len, own_groups)):
            raise ValueError(f"its groups have {sizes} parameters, and this run's {list(map(len, own_groups))}")
        numbers = [number for group in saved_groups for number in group["params"]]
        for number, (_, run) in zip(numbers, self._in_order(), strict=True):
            for key, value in state["state"].get(number, {}).items():
                if isinstance(value, Tensor) and value.ndim and value.shape != run.shape:
                    raise ValueError(f"its {key!r} is {tuple(value.shape)} in place of {tuple(run.shape)}")
        for group, saved in zip(self._param_groups, saved_groups, strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
        if not state["state"]:  # before the first step
            self.optimizer.state.clear()
        for number, (group, run) in zip(numbers, self._in_order(), strict=True):
            own = self.optimizer.state[group.flat]
            for key, value in state["state"].get(number, {}).items():
                if isinstance(value, Tensor) and value.shape == run.shape:
                    if key not in own:
                        own[key] = torch.zeros_like(group.flat, dtype=value.dtype, requires_grad=False)
                    run.of(own[key]).put(value)
                elif isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.ndim == 0):
                    own[key] = self._scalar(float(value))

    def _scalar(self, value: float) -> Any:
        """A count of steps, as the optimizer keeps it: DeepSpeed's own ones as a number."""
        if type(self.optimizer).__module__.startswith("deepspeed."):
            return int(value)
        return torch.tensor(value, dtype=torch.float32)

    def refresh(self) -> None:
        """Copy what the optimizer steps to the model, after it has been overwritten. All processes must take part."""
        zero = self._zero
        if not _is_stage_3(zero):
            zero.update_lp_params()
            return
        zero.empty_partition_cache()
        for number in range(len(self._groups)):
            zero._reassign_or_swap_out_partitioned_parameters(number)
        if kept := zero.persistent_parameters:
            kept[0].all_gather(kept)

    def _in_order(self) -> Iterator[tuple[_Group, Run]]:
        """The parameters' runs, in the order of `param_groups`."""
        for number in range(len(self._param_groups)):
            for group in self._groups:
                if group.number == number:
                    for _, run in group.runs:
                        yield group, run


def zero_of(optimizer: Any) -> Zero | None:
    """What an engine needs of an optimizer of DeepSpeed's ZeRO; None for other optimizers.

    Args:
        optimizer: an optimizer, or a wrapper that holds it in ``.optimizer``.

    Raises:
        UnsupportedOptimizerError: DeepSpeed's optimizer is not supported; the message says why.
    """
    inner = optimizer
    while inner is not None:
        if any(cls.__module__ == "deepspeed.runtime.base_optimizer" for cls in type(inner).__mro__):
            return Zero(inner)
        inner = getattr(inner, "optimizer", None)
    return None


def check_owner(model: nn.Module, pairs: list[LoraPair], zero: Zero | None) -> None:
    """Check that a model that DeepSpeed has taken apart is trained by its optimizer, and that it is one we know.

    Args:
        model: the model, or DeepSpeed's wrapper around it.
        pairs: its LoRA pairs.
        zero: the optimizer.

    Raises:
        UnsupportedLayerError: it is another one, or the model is a pipeline.
    """
    if any(cls.__module__.startswith("deepspeed.runtime.pipe") for m in model.modules() for cls in type(m).__mro__):
        raise UnsupportedLayerError(
            "DeepSpeed's pipeline engine is not supported, whose processes have layers of their own: use ZeRO stage 1, "
            "2 or 3, or FSDP2"
        )
    for pair in pairs:
        for key, tensor in (("base weight", pair.weight), ("lora_A", pair.lora_A), ("lora_B", pair.lora_B)):
            if not is_partitioned(tensor):
                continue
            if zero is None:
                refuse(
                    pair.name,
                    f"DeepSpeed's ZeRO-3 has partitioned its {key}, but the optimizer is not DeepSpeed's",
                    "pass the optimizer that accelerator.prepare() or deepspeed.initialize() has returned",
                )
            if missing := [name for name in _OF_PARAMETERS if not hasattr(tensor, name)]:
                raise UnsupportedOptimizerError(_lacks(f"a parameter's {missing[0]}"))
            if hasattr(tensor.ds_tensor, "ds_quant_scale"):  # type: ignore[attr-defined]
                refuse(pair.name, f"DeepSpeed has quantised its {key}", "leave out zero_quantized_nontrainable_weights")


def run_of_weight(weight: Tensor) -> Run | None:
    """The run that this process has of a parameter that ZeRO-3 has divided; None for others.

    Args:
        weight: any tensor.
    """
    if not is_partitioned(weight):
        return None
    parameter: Any = weight
    part = parameter.ds_tensor
    cut = Cut(parameter.ds_numel, part.numel(), 0, alone=True)
    return Run(part, 0, cut, _axis(parameter.ds_process_group), parameter.ds_shape)


def _groups_of_stages_1_and_2(zero: Any) -> Iterator[_Group]:
    axis = _axis(zero.dp_process_group)
    for number, flat in enumerate(zero.single_partition_of_fp32_groups):
        size = int(zero.partition_size[number])
        layout = zip(
            zero.round_robin_bit16_groups[number],
            zero.round_robin_bit16_meta[number],
            zero.round_robin_bit16_offsets[number],
            strict=True,
        )
        runs = {}
        for parameter, meta, offset in layout:
            cut = Cut(meta.numel(), size, offset, alone=False)
            start = max(0, offset - axis.place * size)
            runs[id(parameter)] = Run(flat, min(start, size), cut, axis, meta.shape)
        yield _Group(flat, number, [(parameter, runs[id(parameter)]) for parameter in zero.bit16_groups[number]])


def _groups_of_stage_3(zero: Any) -> Iterator[_Group]:
    axis = _axis(zero.dp_process_group)
    for number, flat in enumerate(zero.fp32_partitioned_groups_flat):
        runs = []
        for parameter in zero.fp16_groups[number]:
            _, start, size = zero.grad_position[zero.get_param_id(parameter)]
            cut = Cut(parameter.ds_numel, size, 0, alone=True)
            runs.append((parameter, Run(flat, start, cut, axis, parameter.ds_shape)))
        yield _Group(flat, zero.sub_group_to_group_id[number], runs)


def _axis(group: Any) -> Axis:
    here = torch.accelerator.current_accelerator()
    if here is None or dist.get_backend(group) == "gloo":
        device = torch.device("cpu")
    else:
        device = torch.device(here.type, torch.accelerator.current_device_index())
    return Axis(group, dist.get_world_size(group), dist.get_rank(group), device)


def _ranks(group: Any) -> tuple[int, ...]:
    return tuple(dist.get_process_group_ranks(group))


def _is_divided(value: Any, flat: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == flat.shape


def _is_stage_3(zero: Any) -> bool:
    return type(zero).__name__.endswith("Stage3")


def _check(zero: Any) -> None:
    name = type(zero).__name__
    if "ZenFlow" in name:
        raise UnsupportedOptimizerError(f"DeepSpeed's ZenFlow ({name}) is not supported: {_USE}")
    if name not in _CLASSES:
        raise UnsupportedOptimizerError(
            f"DeepSpeed's {name} is not supported: use ZeRO stage 1, 2 or 3 (zero_optimization.stage in its config; "
            "with bf16 and stage 1 also data_types.grad_accum_dtype: 'bf16')"
        )
    for attribute in (*_BOTH, *_CLASSES[name]):
        if not hasattr(zero, attribute):
            raise UnsupportedOptimizerError(_lacks(f"{name}.{attribute}"))
    for applies, what, way_out in (*_REFUSED_IN_BOTH, *_REFUSED[name]):
        if applies(zero):
            raise UnsupportedOptimizerError(f"DeepSpeed with {what} is not supported: {way_out}")


def _lacks(what: str) -> str:
    version = getattr(sys.modules.get("deepspeed"), "__version__", "of this version")
    return f"DeepSpeed {version} lacks {what}, which ScaLoRA needs: use DeepSpeed {_VERSION}"
