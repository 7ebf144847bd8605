"""`PairAdamW`: AdamW for LoRA pairs, with moments that any change of the factors carries over exactly.

Beyond the paper; the equations are in `scalora.maths.pair_moments` and `scalora.maths.weight_steps`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any, NamedTuple, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from scalora.config import default_weight_rate
from scalora.maths.pair_moments import Corrections, directions, update_moments
from scalora.maths.scaling import solver_dtype
from scalora.maths.weight_steps import step_sizes
from scalora.model.adapters import LoraPair, find_lora_pairs, in_chunks
from scalora.model.layers import has_signs
from scalora.model.matrices import stack_of_A, stack_of_B
from scalora.parallel.sharded_pairs import check_held, check_shards, held_by, with_their_shards
from scalora.parallel.shards import axis_of, gathering, local
from scalora.rescale.moments import is_being_captured
from scalora.rescale.optimizers import loss_of
from scalora.rescale.replay import GraphMemory, Number, Replay, addresses, is_recordable
from scalora.rescale.transport import gradients_of

_Group = dict[str, Any]


class _Member(NamedTuple):
    """A pair that is stepped: the places of the parameter groups and the moments of its factors, and their states."""

    pair: LoraPair
    group_A: int
    group_B: int
    moments_A: int
    moments_B: int
    state_A: dict[str, Any]
    state_B: dict[str, Any]


class _Moments(NamedTuple):
    """What the moments of a factor depend on besides gradients."""

    step: int
    betas: tuple[float, float]
    eps: float


class _Alike(NamedTuple):
    """What pairs that are stepped together have in common."""

    shape_A: torch.Size
    shape_B: torch.Size
    experts: int
    dtype: torch.dtype
    device: torch.device
    moments_A: int
    moments_B: int

    @classmethod
    def of(cls, member: _Member) -> _Alike:
        A, B, experts = member.pair.lora_A, member.pair.lora_B, member.pair.experts
        return cls(A.shape, B.shape, experts, A.dtype, A.device, member.moments_A, member.moments_B)


class _Tensors(NamedTuple):
    """The tensors of a parameter that a step changes, or needs: whole ones, if the parameter is split (FSDP2)."""

    value: Tensor
    gradient: Tensor
    first: Tensor


class _Factors(NamedTuple):
    """The factors of one shape, A or B, of pairs that are alike. Each expert is a layer.

    Attributes:
        states: the parameters' states.
        tensors: their tensors.
        tall: whether the parameters themselves have r columns, as ``lora_B``, and not r rows, as ``lora_A``.
        experts: of how many experts each parameter has the factors.
        rates: their learning rates.
        kept: what weight decay leaves of each.
        sizes: step sizes with which an entry of a weight moves by 1, (layers,).
    """

    states: Sequence[dict[str, Any]]
    tensors: list[_Tensors]
    tall: bool
    experts: int
    rates: Sequence[Number]
    kept: Sequence[Number]
    sizes: Float[Tensor, " layers"]

    @classmethod
    def of(
        cls, members: list[_Member], numbers: Mapping[Any, Number], wholes: dict[nn.Parameter, _Tensors]
    ) -> tuple[_Factors, _Factors]:
        """The two factors of pairs."""
        pairs = [member.pair for member in members]
        tensors_A = [_tensors(wholes, m.pair.lora_A, m.state_A) for m in members]
        tensors_B = [_tensors(wholes, m.pair.lora_B, m.state_B) for m in members]
        experts = pairs[0].experts
        A = _stacked([t.value for t in tensors_B], experts, tall=True)
        B = _stacked([t.value for t in tensors_A], experts, tall=False)
        sizes = step_sizes(A, B, _of_layers([numbers["scaling", pair.scaling] for pair in pairs], A, experts))

        def factors(states: list[Any], tensors: list[_Tensors], tall: bool, groups: list[int]) -> _Factors:
            rates = [numbers["lr", group] for group in groups]
            kept = [numbers.get(("kept", group), 1.0) for group in groups]
            return cls(states, tensors, tall, experts, rates, kept, sizes)

        return (
            factors([m.state_A for m in members], tensors_A, False, [m.group_A for m in members]),
            factors([m.state_B for m in members], tensors_B, True, [m.group_B for m in members]),
        )

    @property
    def r(self) -> int:
        """The rank."""
        return int(self.states[0]["second_moment"].shape[-1])

    def stacked(self, tensors: list[Tensor]) -> Float[Tensor, "layers d r"]:
        """Copies of tensors of the parameters' shape, with r columns each."""
        return _stacked(tensors, self.experts, tall=self.tall)

    def store(self, tensors: list[Any], values: Float[Tensor, "layers d r"]) -> None:
        """Overwrite tensors of the parameters' shape with others, given as from `stacked`."""
        # In the layout of the parameters, so that one kernel copies for all of them.
        values = values if self.tall else values.mT.contiguous()
        if _are_matrices(tensors, self.experts):
            torch._foreach_copy_(tensors, list(values.unbind()))
            return
        stacks = [_as_stack(tensor, self.experts, tall=self.tall) for tensor in tensors]
        torch._foreach_copy_(stacks, list(torch.split(values, self.experts)))

    def of_layers(self, tensors: list[Tensor]) -> Tensor:
        """Entries of the parameters' states, which have a dimension for experts if there are any, stacked."""
        stack = torch.stack(tensors)
        return stack if self.experts == 1 else stack.flatten(0, 1)

    def of_parameters(self, stack: Tensor) -> list[Tensor]:
        """The inverse of `of_layers`."""
        if self.experts > 1:
            stack = stack.view(len(self.states), self.experts, *stack.shape[1:])
        return list(stack.unbind())

    def move(self, directions: Float[Tensor, "layers d r"]) -> None:
        """Take a step in directions with entries of order 1, which are overwritten."""
        values = self.stacked([t.value for t in self.tensors])
        if any(isinstance(kept, Tensor) or kept != 1 for kept in self.kept):
            kept = _of_layers(self.kept, values, self.experts)
            values.mul_(kept[:, None, None] if isinstance(kept, Tensor) and kept.ndim else kept)
        lengths = self.sizes * _of_layers(self.rates, values, self.experts)
        self.store([t.value for t in self.tensors], directions.mul_(-lengths[:, None, None]).add_(values))


class PairAdamW(Optimizer):
    """AdamW whose second moment of a LoRA factor is an r × r matrix and a weight for each row.

    Its state takes about half the memory of AdamW's, and `scalora.ScaLora` with ``mode="matrix"`` carries it through
    every rescale exactly. Without rescales it is LoRA with another optimizer. Parameters that belong to no LoRA pair
    (heads, norms, embeddings) are stepped by AdamW, so that one optimizer does for a whole model.

    The learning rate is the same kind of number for all of them: by how much a step moves an entry of a weight. For a
    LoRA pair that is an entry of the weight under it, ``W + s·A·Bᵀ``, in root mean square. So the rates to try are
    those of full fine-tuning, a half to a tenth of LoRA's. A good one stays good when rank or ``lora_alpha`` change;
    with the width of a model it falls, as that of full fine-tuning does.

    Weight decay is decoupled, as AdamW's, and decays the product: a step multiplies ``s·A·Bᵀ`` by
    ``1 − lr·weight_decay`` and so pulls the weight towards the base's. With `scalora.ScaLora`, the remainder decays
    with it.

    Examples:
        >>> model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
        >>> optimizer = PairAdamW(model)
        >>> ScaLora(model, optimizer, ScaLoraConfig(mode="matrix"))  # and train as before

    In a `transformers.Trainer`, `scalora.ScaLoraCallback` and `scalora.BlockSignsCallback` make it with the Trainer's
    settings (``pair_adamw=True``). ``optimizer_cls_and_kwargs=(PairAdamW, {"model": model, "lr": …})`` makes it, too,
    but the Trainer's learning rate, betas and weight decay have no effect then.

    Args:
        model: a model with PEFT LoRA layers and exactly one active adapter.
        params: parameters or parameter groups, as for other optimizers. None: all trainable parameters of the model.
        lr: learning rate: the root mean square by which a step moves the entries of a weight. None: 0.23 by the median
            number of the adapted layers' inputs, the hidden size of most models, because the best rate falls with it:
            4e-4 for a width of 576, 5.6e-5 for one of 4,096. Twice that if the updates have block signs.
        betas: decay rates of the first and second moments.
        eps: term added to the denominators for numerical stability.
        weight_decay: decoupled weight decay. 0 by default, as for LoRA in the libraries.

    Raises:
        UnsupportedLayerError: a layer is not one that ScaLoRA can train; the message names it.
        ValueError: a setting is out of range, or only one factor of a pair is among the parameters.

    Attributes:
        graph_memory: what a step on a GPU takes for its temporary tensors, which rescales may use as well.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        *,
        lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if value is not None and not value >= 0:
                raise ValueError(f"{name} must be at least 0, got {value!r}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be at least 0 and below 1, got {betas!r}")
        self._pairs = find_lora_pairs(model, sharded=True, all_shapes=True, signed=True)
        check_shards(self._pairs)
        if lr is None:
            width = median(pair.n for pair in self._pairs)
            signs = any(has_signs(pair.layer, pair.adapter) for pair in self._pairs)
            lr = default_weight_rate(width, block_signs=signs)
        self._had_steps = self._is_sharded = False
        self.graph_memory = GraphMemory()
        self._replay = Replay[None]("a step of PairAdamW", self.graph_memory)
        given = [p for p in model.parameters() if p.requires_grad] if params is None else params
        super().__init__(given, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        held = held_by(self)
        self._held = {pair.name for pair in self._pairs if id(pair.lora_A) in held}
        for pair in self._pairs:
            if (pair.name in self._held) != (id(pair.lora_B) in held):
                raise ValueError(
                    f"module {pair.name!r}: params holds one of lora_A and lora_B, but they are stepped together: give "
                    "both, or none of them"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step. Does not wait for the device.

        Args:
            closure: recomputes the loss and the gradients.

        Returns:
            The value of the closure; None without one.

        Raises:
            RuntimeError: the step is being captured in a CUDA graph, or one factor of a pair alone has a gradient.
            UnsupportedOptimizerError: at the first step: DeepSpeed or FSDP1 has put flat tensors in the places of the
                factors, of which there are no pairs.
        """
        if is_being_captured(self._pairs[0].lora_A.device):
            raise RuntimeError(
                "PairAdamW.step() is being captured in a CUDA graph, but its count of steps is the host's: capture the "
                "forward and backward passes alone (torch.cuda.make_graphed_callables); it replays its own kernels"
            )
        loss: float | None = loss_of(closure)
        if not self._had_steps:  # Accelerate shards a model that has its optimizer already
            self._pairs = with_their_shards(self._pairs)
            check_held(self, [pair for pair in self._pairs if pair.name in self._held])
            self._is_sharded = any(pair.is_sharded for pair in self._pairs)
            self._had_steps = True
        self._check_both_factors()
        if taking_part := self._taking_part():
            self._step_pairs(taking_part)
        in_pairs = {id(p) for pair in self._pairs for p in (pair.lora_A, pair.lora_B)}
        for group in self.param_groups:
            self._step_others([p for p in group["params"] if id(p) not in in_pairs and p.grad is not None], group)
        return loss

    def _step_pairs(self, taking_part: list[tuple[LoraPair, int, int]]) -> None:
        """Step the factors of pairs, which are given with the places of the parameter groups of lora_A and lora_B."""
        states = [(self._state_of(pair.lora_A, pair), self._state_of(pair.lora_B, pair)) for pair, *_ in taking_part]
        settings = [(tuple(group["betas"]), group["eps"]) for group in self.param_groups]
        moments: dict[_Moments, int] = {}
        members = []
        numbers: dict[Any, Number] = {}
        for (pair, in_A, in_B), (of_A, of_B), (step_A, step_B) in zip(
            taking_part, states, _count_steps(states), strict=True
        ):
            moments_A = moments.setdefault(_Moments(step_A, *settings[in_A]), len(moments))
            moments_B = moments.setdefault(_Moments(step_B, *settings[in_B]), len(moments))
            members.append(_Member(pair, in_A, in_B, moments_A, moments_B, of_A, of_B))
            numbers["scaling", pair.scaling] = pair.scaling
        for kind, index in moments.items():
            numbers["first", index], numbers["second", index] = Corrections.after(kind.step, kind.betas)
        for index, group in enumerate(self.param_groups):
            numbers["lr", index] = group["lr"]
            if group["weight_decay"]:
                numbers["kept", index] = _kept(group)
        self._replay(
            partial(self._move, members, list(moments)),
            self._key(members, moments),
            [factor for member in members for factor in (member.pair.lora_A, member.pair.lora_B)],
            numbers,
        )

    def _key(self, members: list[_Member], moments: Iterable[_Moments]) -> Hashable:
        """What the kernels of a step depend on; None if they can't be replayed."""
        if self._is_sharded or not is_recordable(member.pair.lora_A.device for member in members):
            return None
        tensors: list[Tensor] = []
        for pair, *_, state_A, state_B in members:
            for factor, state in ((pair.lora_A, state_A), (pair.lora_B, state_B)):
                tensors += (factor, state["exp_avg"], state["second_moment"], state["row_weights"])
        places = [(m.group_A, m.group_B, m.moments_A, m.moments_B, m.pair.scaling) for m in members]
        return addresses(tensors), tuple(places), tuple([(kind.betas, kind.eps) for kind in moments])

    def _move(self, members: list[_Member], moments: list[_Moments], numbers: Mapping[Any, Number]) -> None:
        """Step the factors of pairs. Launches the same for members and moments that have the same key."""
        alike: dict[_Alike, list[_Member]] = defaultdict(list)
        for member in members:
            alike[_Alike.of(member)].append(member)
        wholes = self._wholes(members) if self._is_sharded else {}
        together: dict[tuple[Any, ...], list[_Factors]] = defaultdict(list)
        for kind, of_kind in alike.items():
            for members_of_chunk in in_chunks(of_kind, [member.pair for member in of_kind]):
                both = _Factors.of(members_of_chunk, numbers, wholes)
                for factors, index in zip(both, (kind.moments_A, kind.moments_B), strict=True):
                    together[index, factors.r, kind.dtype, kind.device].append(factors)
        for (index, *_), of_all_shapes in together.items():
            corrections = Corrections(numbers["first", index], numbers["second", index])
            found = _directions(of_all_shapes, moments[index], corrections)
            for factors, directions_of_shape in zip(of_all_shapes, found, strict=True):
                factors.move(directions_of_shape)
        self._keep_rows(wholes)

    def __getstate__(self) -> NoReturn:
        # Optimizer's leaves out what is not a torch.optim.Optimizer's own, and a copy would belong to no model.
        raise TypeError(
            "PairAdamW can't be copied or pickled, as it belongs to a model: make another one of the other model, and "
            "give it this one's state_dict()"
        )

    @property
    def decays(self) -> bool:
        """Whether any parameter group has a weight decay."""
        return any(group["weight_decay"] for group in self.param_groups)

    def kept_products(self) -> Iterator[tuple[LoraPair, float]]:
        """The pairs whose product the next step decays.

        Yields:
            The pair, and the factor that the step leaves of its product.
        """
        of_group = [_kept(group) for group in self.param_groups]
        for pair, in_A, in_B in self._taking_part():
            if (kept := of_group[in_A] * of_group[in_B]) != 1:
                yield pair, kept

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state from `state_dict`.

        Args:
            state_dict: the state.
        """
        super().load_state_dict(state_dict)
        # torch rounds all state to the parameter's dtype.
        parameters = [p for group in self.param_groups for p in group["params"]]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for parameter, number in zip(parameters, numbers, strict=True):
            if (exact := state_dict["state"].get(number, {}).get("second_moment")) is not None:
                dtype = solver_dtype(parameter.device)
                self.state[parameter]["second_moment"] = exact.to(parameter.device, dtype, copy=True)

    def _check_both_factors(self) -> None:
        for pair in self._pairs:
            lacks_A, lacks_B = pair.lora_A.grad is None, pair.lora_B.grad is None
            if lacks_A != lacks_B and pair.name in self._held:
                raise RuntimeError(
                    f"module {pair.name!r}: {'lora_A' if lacks_A else 'lora_B'} has no gradient, but the other "
                    "factor has, and PairAdamW steps both together: freeze both or neither, or train with AdamW"
                )

    def _taking_part(self) -> list[tuple[LoraPair, int, int]]:
        """The pairs that have gradients and are among the parameters, with the places of both factors' groups."""
        place_of = {id(p): place for place, group in enumerate(self.param_groups) for p in group["params"]}
        return [
            (pair, place_of[id(pair.lora_A)], place_of[id(pair.lora_B)])
            for pair in self._pairs
            if pair.has_gradients and id(pair.lora_A) in place_of
        ]

    def _wholes(self, members: list[_Member]) -> dict[nn.Parameter, _Tensors]:
        """The whole tensors of factors that are split over processes, with one collective for each group of them."""
        of_axis: dict[Any, list[nn.Parameter]] = defaultdict(list)
        for parameter in (factor for m in members for factor in (m.pair.lora_A, m.pair.lora_B)):
            if (axis := axis_of(parameter)) is not None:
                of_axis[axis].append(parameter)
        found: dict[nn.Parameter, _Tensors] = {}
        for axis, parameters in of_axis.items():
            parts = [t for p in parameters for t in _tensors({}, p, self.state[p])]
            totals = [p.shape[0] for p in parameters for _ in _Tensors._fields]
            of_all = iter(gathering([local(part) for part in parts], totals, axis)())
            found |= {p: _Tensors(next(of_all), next(of_all), next(of_all)) for p in parameters}
        return found

    def _keep_rows(self, wholes: dict[nn.Parameter, _Tensors]) -> None:
        """Copy what a step has changed of whole tensors to the rows that are in this process."""
        for parameter, whole in wholes.items():
            axis = axis_of(parameter)
            assert axis is not None
            rows = axis.rows(parameter.shape[0])
            local(parameter).copy_(whole.value[rows])
            local(self.state[parameter]["exp_avg"]).copy_(whole.first[rows])

    def _state_of(self, parameter: nn.Parameter, pair: LoraPair) -> dict[str, Any]:
        """The state of a factor of a pair, which is created before its first step."""
        state: dict[str, Any] = self.state[parameter]
        if not state:
            stack = () if pair.experts == 1 else (pair.experts,)
            rows = pair.n if parameter is pair.lora_A else pair.m
            state["step"] = torch.zeros((), dtype=torch.float32)  # on the CPU, as AdamW's
            state["exp_avg"] = torch.zeros_like(parameter)
            # Whole in every process, also where the parameter is split.
            square, dtype = (*stack, pair.r, pair.r), solver_dtype(parameter.device)
            state["second_moment"] = local(parameter).new_zeros(square, dtype=dtype)
            state["row_weights"] = local(parameter).new_zeros(*stack, rows)
        return state

    def _step_others(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Step parameters of one group that belong to no pair by AdamW."""
        if not parameters:
            return
        for parameter in parameters:
            if not (state := self.state[parameter]):
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        states = [self.state[p] for p in parameters]
        beta1, beta2 = group["betas"]
        adamw(
            parameters,  # type: ignore[arg-type]
            gradients_of(parameters),
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            foreach=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _tensors(wholes: dict[nn.Parameter, _Tensors], parameter: nn.Parameter, state: dict[str, Any]) -> _Tensors:
    """The tensors of a parameter that has a gradient: whole ones, if there are."""
    if wholes and parameter in wholes:
        return wholes[parameter]
    assert parameter.grad is not None
    return _Tensors(parameter, parameter.grad, state["exp_avg"])


def _count_steps(states: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[tuple[int, int]]:
    """Count a step of the factors of each pair, given their states, and return how many they have had by then."""
    counts = [state["step"] for of_pair in states for state in of_pair]
    torch._foreach_add_(counts, 1)
    numbers = torch.stack(counts).int().tolist()
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def _directions(of_all_shapes: list[_Factors], moments: _Moments, corrections: Corrections) -> Iterator[Tensor]:
    """Update the moments of factors of one rank, and return the directions of those of each shape."""
    gradients, firsts, seconds, row_weights = [], [], [], []
    for factors in of_all_shapes:
        gradients.append(factors.stacked([t.gradient for t in factors.tensors]))
        firsts.append(factors.stacked([t.first for t in factors.tensors]))
        seconds.append(factors.of_layers([state["second_moment"] for state in factors.states]))
        row_weights.append(factors.of_layers([state["row_weights"] for state in factors.states]))
    update_moments(gradients, firsts, seconds, row_weights, betas=moments.betas, corrections=corrections)
    for factors, first, second, weights in zip(of_all_shapes, firsts, seconds, row_weights, strict=True):
        factors.store([t.first for t in factors.tensors], first)
        torch._foreach_copy_([s["second_moment"] for s in factors.states], factors.of_parameters(second))
        torch._foreach_copy_([s["row_weights"] for s in factors.states], factors.of_parameters(weights))
    # The gradients' copies are free by the time of the first of these.
    return directions(firsts, seconds, row_weights, corrections=corrections, eps=moments.eps)


def _kept(group: _Group) -> float:
    """What weight decay leaves of a factor: the root of what it leaves of a product."""
    kept: float = (1 - group["lr"] * group["weight_decay"]) ** 0.5
    return kept


def _stacked(tensors: list[Tensor], experts: int, *, tall: bool) -> Float[Tensor, "layers d r"]:
    """Tensors of the shape of ``lora_B`` (tall), or of ``lora_A``, with r columns each, those of each expert."""
    if _are_matrices(tensors, experts):
        stack = torch.stack(tensors)
    else:
        stack = torch.cat([_as_stack(tensor, experts, tall=tall) for tensor in tensors])
    return stack if tall else stack.mT


def _are_matrices(tensors: list[Tensor], experts: int) -> bool:
    """Whether tensors of one shape are the matrices of the paper as they are."""
    return experts == 1 and tensors[0].ndim == 2


def _as_stack(tensor: Tensor, experts: int, *, tall: bool) -> Float[Tensor, "experts rows columns"]:
    """A view of a tensor of the shape of ``lora_B`` (tall), or of ``lora_A``, as matrices of that shape."""
    return stack_of_B(tensor, experts) if tall else stack_of_A(tensor, experts)


def _of_layers(numbers: Sequence[Number], like: Tensor, experts: int) -> Float[Tensor, " layers"] | Number:
    """One number for each pair, for each of its experts, on the device of their factors; or the one that all have.

    What is the same for all need not be sent there, for which some drivers wait.
    """
    if len({id(number) if isinstance(number, Tensor) else number for number in numbers}) == 1:
        return numbers[0]
    if any(isinstance(number, Tensor) for number in numbers):
        scalars = [number if isinstance(number, Tensor) else like.new_full((), number) for number in numbers]
        return torch.stack([scalar.to(like) for scalar in scalars]).repeat_interleave(experts)
    repeated = [number for number in numbers for _ in range(experts)]
    return torch.tensor(repeated, dtype=like.dtype).to(like.device, non_blocking=True)
