"""Merges by the Triton kernel, in its interpreter, beside PyTorch's own operations: run in a process of its own.

Triton is interpreted only if the environment says so before it is imported.
"""

import contextlib
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from scalora.rescale import kernels, one_pass
from scalora.rescale.eight_bit import EightBitRemainder
from scalora.rescale.remainder import DenseRemainder, add_to_all, scale_columns
from scalora.rescale.stochastic import StochasticRemainder

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


@contextlib.contextmanager
def interpreter():
    """A function that calls another one in a process with Triton's interpreter."""
    os.environ["TRITON_INTERPRET"] = "1"
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            pool.submit(torch.set_num_threads, 1).result()
        finally:
            del os.environ["TRITON_INTERPRET"]
        yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result()


def remainder_of(weight, kind, transposed, number):
    if kind == "stochastic":
        return StochasticRemainder(weight, transposed=transposed, name=f"layers.{number}")
    kinds = {"dense": DenseRemainder, "dense_8bit": EightBitRemainder}
    return kinds[kind](weight, transposed=transposed)


def in_both(weights, lows, lora_B, lora_A, coefficients, kind="dense", transposed=False, steps=1):
    """Bits of the weights and of the lower halves after merges by the kernel, and after those by PyTorch's operations.

    Returns also the number of launches.
    """
    launches, launch = 0, one_pass._launch

    def counted(*args):
        nonlocal launches
        launches += 1
        launch(*args)

    results = []
    one_pass._launch = counted
    try:
        for by_kernel in (True, False):
            own = [weight.clone() for weight in weights]
            remainders = [remainder_of(w, kind, transposed, number) for number, w in enumerate(own)]
            for remainder, low in zip(remainders, lows, strict=True):
                if remainder.rounded_off is not None and low is not None:
                    remainder.rounded_off.copy_(low)
            for step in range(steps):
                for remainder in remainders:
                    remainder.step = step
                if by_kernel:
                    kernels.merge(remainders, own, lora_B, lora_A, coefficients)
                else:
                    left, right = scale_columns(torch.stack(lora_B), torch.stack(lora_A).mT, coefficients)
                    add_to_all(remainders, own, left.unbind(), right.unbind())
            assert all(remainder.changed for remainder in remainders)
            kept = [r.rounded_off for r in remainders if r.rounded_off is not None]
            exact = [r.exact(w).float().numpy() for r, w in zip(remainders, own, strict=True)]
            results.append(([w.view(BITS[w.dtype]).numpy() for w in own], [low.numpy() for low in kept], exact))
    finally:
        one_pass._launch = launch
    return *results, launches


def dyadic(dtype, m, n, r, kind="dense", transposed=False, layers=3, steps=2):
    """Merges of products that are exact in float32, in any order of summation."""
    generator = torch.Generator().manual_seed(m * n + r)

    def integers(*shape):
        return torch.randint(-8, 9, shape, generator=generator)

    shape = (n, m) if transposed else (m, n)
    powers = 2.0 ** torch.randint(-20, 4, (layers, *shape), generator=generator)
    weights = [w.to(dtype) for w in torch.randn(layers, *shape, generator=generator) * powers]
    # Of these, remainders with 8 bits take the lower 8.
    lows = [torch.randint(-32767, 32768, shape, generator=generator).to(torch.int16) for _ in range(layers)]
    lora_B = [integers(m, r) / 64 for _ in range(layers)]
    lora_A = [integers(r, n) / 64 for _ in range(layers)]
    coefficients = (integers(layers, r) // 4).double() / 2
    # What a column with the coefficient 0 holds does not matter.
    coefficients[0, 0] = 0
    lora_B[0][:, 0], lora_A[0][0] = torch.nan, torch.inf
    return in_both(weights, lows, lora_B, lora_A, coefficients, kind, transposed, steps)


def every_half(dtype, lows, row_values, r, kind="dense"):
    """Merges into every half-precision number, with lower halves from a list and changes that are alike in a row."""
    numbers = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).view(256, 256)
    numbers = numbers[:, torch.randperm(256, generator=torch.Generator().manual_seed(0))]
    lows = torch.tensor(lows, dtype=torch.int16).repeat(256 * 256 // len(lows) + 1)[: 256 * 256].view(256, 256)
    lora_B = torch.zeros(256, r)
    lora_B[:, 0] = torch.tensor(row_values).repeat(256 // len(row_values) + 1)[:256]
    lora_A = torch.zeros(r, 256)
    lora_A[0] = 1
    return in_both([numbers], [lows], [lora_B], [lora_A], torch.ones(1, r, dtype=torch.float64), kind)


def random_sums(dtype, m, n, r):
    """What is joined after a merge of random factors, and the exact sum in float64."""
    generator = torch.Generator().manual_seed(r)
    weight = torch.randn(m, n, generator=generator).to(dtype)
    lora_B, lora_A = torch.randn(m, r, generator=generator) / r**0.5, torch.randn(r, n, generator=generator)
    coefficients = torch.rand(1, r, generator=generator, dtype=torch.float64)
    (_, _, (joined,)), _, launches = in_both([weight], [None], [lora_B], [lora_A], coefficients)
    exact = weight.double() + (lora_B.double() * coefficients) @ lora_A.double()
    return joined, exact.numpy(), launches


def of_rows(dtype, kind):
    """The last rows of a weight, after a merge into these alone by the kernel, and into all by PyTorch; launches."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(48, 40, generator=generator).to(dtype)
    lora_B, lora_A = (torch.randint(-8, 9, shape, generator=generator) / 64 for shape in ((48, 2), (2, 40)))
    own, ones = weight.clone(), torch.ones(1, 2, dtype=torch.float64)
    remainders = []
    for tensor in (weight, own):
        if kind == "stochastic":
            remainders.append(StochasticRemainder(tensor, transposed=False, name="layer"))
        else:
            remainders.append(DenseRemainder(tensor, transposed=False))
    low = remainders[1].rounded_off
    part, calls, launch = remainders[1].of_part(None if low is None else low[16:], 16), [], one_pass._launch
    one_pass._launch = lambda *args: (calls.append(1), launch(*args))
    kernels.merge([part], [own[16:]], [lora_B[16:]], [lora_A], ones)
    one_pass._launch = launch
    remainders[0].add(weight, lora_B, lora_A.mT)
    found, wanted = ((t[16:].view(torch.int16).numpy()) for t in (own, weight))
    return found, wanted, len(calls)


def layouts():
    """For weights that the kernel leaves to PyTorch, the number of launches; for one that it takes, too."""
    storage = torch.zeros(16 * 40 + 8, dtype=torch.bfloat16)
    weights = {
        "plain": torch.zeros(16, 40, dtype=torch.bfloat16),
        "not contiguous": torch.zeros(40, 16, dtype=torch.bfloat16).mT,
        "misaligned": storage[1 : 1 + 16 * 40].view(16, 40),
        "float64": torch.zeros(16, 40, dtype=torch.float64),
    }
    counts, launch = {}, one_pass._launch
    for name, weight in weights.items():
        calls = []
        one_pass._launch = lambda *args, calls=calls: (calls.append(1), launch(*args))
        remainder = DenseRemainder(weight, transposed=False)
        kernels.merge([remainder], [weight], [torch.ones(16, 2)], [torch.ones(2, 40)], torch.ones(1, 2).double())
        counts[name] = len(calls), bool((weight == 2).all())
    one_pass._launch = launch
    return counts


def bytes_read(m, n, r, layers, *, outer):
    """Bytes of factors, and of weights and lower halves, that the kernel reads, and all that it writes.

    With outer products, factors are read as vectors; otherwise only the coefficients are.
    """
    from triton.runtime.interpreter import InterpreterBuilder

    counts = {"factors": 0, "weights": 0, "written": 0}
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counted_load(self, pointers, mask, *args):
        values = load(self, pointers, mask, *args)
        if mask.data.ndim == 2 or (outer and mask.data.size > 1):
            kind = "factors" if values.data.dtype.itemsize == 4 else "weights"
            counts[kind] += int(mask.data.sum()) * values.data.dtype.itemsize
        return values

    def counted_store(self, pointers, value, mask, *args):
        counts["written"] += int(mask.data.sum()) * value.data.dtype.itemsize
        return store(self, pointers, value, mask, *args)

    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = counted_load, counted_store
    try:
        dyadic(torch.bfloat16, m, n, r, layers=layers, steps=1)
    finally:
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store
    return counts


def tables():
    """How many tables are sent to the device in three merges into the same weights."""
    weights = [torch.zeros(16, 40, dtype=torch.bfloat16) for _ in range(3)]
    remainders = [DenseRemainder(weight, transposed=False) for weight in weights]
    before = one_pass._table.cache_info().misses
    for _ in range(3):
        kernels.merge(remainders, weights, [torch.ones(16, 2)] * 3, [torch.ones(2, 40)] * 3, torch.ones(3, 2).double())
    assert all(weight._version == 3 for weight in weights)
    return one_pass._table.cache_info().misses - before


def by_chance(dtype, name, step, weight, left, right):
    """The weight after a stochastic merge by PyTorch's own operations, in this process."""
    own = torch.from_numpy(weight).to(dtype)
    remainder = StochasticRemainder(own, transposed=False, name=name)
    remainder.step = step
    remainder.add(own, torch.from_numpy(left), torch.from_numpy(right))
    return own.float().numpy()
