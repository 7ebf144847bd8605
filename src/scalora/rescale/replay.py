"""Replays what a function launches on a GPU, call after call, as one CUDA graph.

A rescale and a step of `PairAdamW` are hundreds of small kernels, which take the host several times as long to launch
as the device to run.
"""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from scalora.rescale.notices import in_one_line
from scalora.rescale.transport import gradients_of

Output = TypeVar("Output")

Number = Tensor | float
"""A scalar that a function depends on: on the device, or on the host."""

# Of a GPU's memory, the most that the temporary tensors of a recording may keep. It is missing in forward and backward
# passes, where those of what is launched one by one are not: a run must not end for want of it.
_MOST_MEMORY = 0.02

# The call alike that is recorded: what is compiled, set up and allocated once is done by then.
_RECORDED = 3

# The most variants that are recorded. A factored remainder of the default 64 columns has 9 places for 8 columns.
_MOST_VARIANTS = 20

_allowed = True


class GraphMemory:
    """Memory of graphs that are launched one after the other, on one stream: what each leaves free, the others use."""

    def __init__(self) -> None:
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self._stream: torch.cuda.Stream | None = None
        self._gradients: dict[int, Tensor] = {}

    def for_gradients(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Tensors like the gradients of parameters, which each graph fills anew: the same for all of them.

        Args:
            parameters: parameters that have a gradient.
        """
        found = []
        for parameter, gradient in zip(parameters, gradients_of(parameters), strict=True):
            own = self._gradients.get(id(parameter))
            if own is None or (own.shape, own.dtype, own.device) != (gradient.shape, gradient.dtype, gradient.device):
                own = self._gradients[id(parameter)] = torch.empty_like(gradient)
            found.append(own)
        return found

    def free_unused(self) -> None:
        """Free the tensors for gradients if there is no graph."""
        if not self._graphs:
            self._gradients.clear()

    def capture(self, function: Callable[[], Output]) -> tuple[torch.cuda.CUDAGraph, Output]:
        """Capture what a function launches on the current device, without running it.

        Args:
            function: the function.
        """
        graph = torch.cuda.CUDAGraph()
        # One, because libraries keep memory for each that they have worked on.
        if self._stream is None or self._stream.device_index != torch.cuda.current_device():
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream())
        # That of a graph that still exists: torch frees a pool with the last one.
        pool = next((other.pool() for other in self._graphs), None) or torch.cuda.graph_pool_handle()
        # Not by torch.cuda.graph, which waits for the device and empties the cache of memory. Other threads, as those
        # that load data, may go on.
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                output = function()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        self._graphs.add(graph)
        return graph, output


class _Recording(NamedTuple):
    """What a function has launched.

    Attributes:
        launch: launches it again.
        output: what the function has returned, whose tensors are overwritten each time.
        gradients: where it finds the parameters' gradients.
        numbers: where it finds the numbers.
    """

    launch: Callable[[], None]
    output: Any
    gradients: list[Tensor]
    numbers: dict[Any, Tensor]


class Replay(Generic[Output]):
    """Calls a function, and from its third call alike on replays what it has launched.

    The recording's temporary tensors and its copies of the gradients stay allocated.

    Args:
        what: what the function does, for a warning.
        memory: for its temporary tensors.
    """

    def __init__(self, what: str, memory: GraphMemory) -> None:
        self._what = what
        self._memory = memory
        self._key: Hashable = None
        self._calls: Counter[Hashable] = Counter()
        self._recordings: dict[Hashable, _Recording | None] = {}

    def __call__(
        self,
        function: Callable[[Mapping[Any, Number]], Output],
        key: Hashable,
        parameters: Sequence[Tensor],
        numbers: Mapping[Any, Number],
        *,
        variant: Hashable = None,
        also_changed: Sequence[Tensor] = (),
        changes_gradients: bool = False,
    ) -> Output:
        """Call the function, or do what it would.

        Args:
            function: the function, which is called with the numbers: as scalars on the device, if there is a key.
            key: what the function depends on, besides the gradients' values and the numbers: the same for two calls
                that launch the same on the same addresses of one GPU. None: it can't be recorded.
            parameters: the parameters that the function changes, and whose gradients it reads.
            numbers: scalars that may be others in each call, by names.
            variant: what else the function depends on, of which some come back again and again.
            also_changed: other tensors that autograd should know to be changed.
            changes_gradients: whether it changes the gradients.

        Returns:
            What the function returns. The next call may overwrite its tensors.
        """
        if key is None:
            self.forget()
            return function(numbers)
        key = (key, tuple(numbers)) if _allowed else None
        if key != self._key:
            self.forget()
            self._key = key
        self._calls[variant] += key is not None
        may_record = len(self._recordings) < _MOST_VARIANTS and None not in self._recordings.values()
        if self._calls[variant] == _RECORDED and may_record:
            self._recordings[variant] = self._recorded(function, parameters, numbers)
        recording = self._recordings.get(variant)
        if recording is None:
            return function(_on_device(numbers, parameters[0].device))
        gradients = gradients_of(parameters)
        torch._foreach_copy_(recording.gradients, gradients)
        for name, number in numbers.items():
            own = recording.numbers[name]
            own.copy_(number) if isinstance(number, Tensor) else own.fill_(number)
        recording.launch()
        if changes_gradients:
            torch._foreach_copy_(gradients, recording.gradients)
        for tensor in (*parameters, *also_changed):
            increment_version(tensor)
        output: Output = recording.output
        return output

    def forget(self) -> None:
        """Free what has been recorded."""
        self._key = None
        self._calls.clear()
        self._recordings.clear()

    def _recorded(
        self,
        function: Callable[[Mapping[Any, Number]], Output],
        parameters: Sequence[Tensor],
        numbers: Mapping[Any, Number],
    ) -> _Recording | None:
        """Record the function; None, with a warning, if that is not possible. Changes nothing."""
        device = parameters[0].device
        gradients = gradients_of(parameters)
        recorded = None
        try:
            own_gradients = self._memory.for_gradients(parameters)
            own_numbers = {name: number.clone() for name, number in _on_device(numbers, device).items()}
            for parameter, own in zip(parameters, own_gradients, strict=True):
                parameter.grad = own
            recorded = record(lambda: function(own_numbers), device, self._memory)
        except Exception as error:  # of the driver, of a library that waits for the device, or for want of memory
            warnings.warn(
                f"{self._what} takes longer than it could, because it can't be recorded in a CUDA graph "
                f"({in_one_line(error)}): what it launches is launched one by one",
                stacklevel=4,
            )
        finally:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
        if recorded is None:
            self._memory.free_unused()
            return None
        return _Recording(*recorded, own_gradients, own_numbers)


def record(
    function: Callable[[], Output], device: torch.device, memory: GraphMemory
) -> tuple[Callable[[], None], Output] | None:
    """Record what a function launches, without running it.

    Args:
        function: the function.
        device: a GPU.
        memory: for its temporary tensors.

    Returns:
        What launches it, and what the function has returned; None if that would keep too much memory.
    """
    with torch.cuda.device(device):
        before = torch.cuda.memory_reserved()
        graph, output = memory.capture(function)
        kept, in_all = torch.cuda.memory_reserved() - before, torch.cuda.get_device_properties(device).total_memory
    return (graph.replay, output) if kept <= _MOST_MEMORY * in_all else None


@contextmanager
def launched_one_by_one() -> Iterator[None]:
    """Context manager in which nothing is replayed, so that a profiler sees the parts of a rescale."""
    global _allowed
    before, _allowed = _allowed, False
    try:
        yield
    finally:
        _allowed = before


def is_recordable(devices: Iterable[torch.device]) -> bool:
    """Whether what works on these devices can be recorded: on one GPU.

    Args:
        devices: the devices.
    """
    found = set(devices)
    return len(found) == 1 and found.pop().type == "cuda"


def addresses(tensors: Sequence[Tensor]) -> tuple[tuple[int, torch.dtype], ...]:
    """Where tensors are in memory, for a key.

    Args:
        tensors: the tensors.
    """
    return tuple([(tensor.data_ptr(), tensor.dtype) for tensor in tensors])


def _on_device(numbers: Mapping[Any, Number], device: torch.device) -> dict[Any, Tensor]:
    """The numbers as scalars on a device, whether they are recorded or not, so that both round alike.

    A division by a number of the host may be a product with its inverse.
    """
    return {
        name: number.to(device)
        if isinstance(number, Tensor)
        else torch.full((), number, dtype=torch.float64, device=device)
        for name, number in numbers.items()
    }
