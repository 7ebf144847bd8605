"""Dense merges that keep 8 bits of each rounding error: hardly any drift, half the memory, no bit changed idly."""

import copy

import pytest
import torch
from drift import drift, train
from hypothesis import given
from hypothesis import strategies as st
from models import Mixed, trainable, with_adapter_in_float32, with_lora
from test_stochastic import HALVES, exports_hold, trained
from torch import nn

import scalora
from scalora import ScaLora, ScaLoraConfig, StateError, UnsupportedLayerError
from scalora.model.adapters import find_lora_pairs
from scalora.rescale import kernels
from scalora.rescale.eight_bit import EightBitRemainder
from scalora.rescale.remainder import DenseRemainder

WIDTH = 64


def every_half(dtype):
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(256, 256).view(dtype).clone()


def spacing(weight):
    """The distance from each half-precision number to the next larger magnitude, in float64."""
    limits = torch.finfo(weight.dtype)
    exponent = torch.frexp(weight.double().abs().clamp(min=limits.smallest_normal)).exponent
    return torch.exp2(exponent.double() - 1) * limits.eps


def split(exact, dtype):
    weight = nn.Parameter(torch.empty(exact.shape, dtype=dtype), requires_grad=False)
    remainder = EightBitRemainder(weight.data, transposed=False)
    remainder.rebuild(exact, weight)
    return weight.data, remainder


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES)
def test_a_thousand_merges_drift_no_more_than_one_rounding(dtype):
    engine, replay = train(dtype, "dense_8bit", width=WIDTH)
    assert engine.metrics()["scalora/rescales"] == 1000
    weight, remainder = replay.layer.base_layer.weight.detach(), replay.layer.frozen_remainder
    assert weight.dtype == dtype
    assert remainder.rounded_off.dtype == torch.int8
    one_rounding = drift(replay.weight.to(dtype), replay.weight)
    assert drift(replay.live(), replay.weight) <= 1.1 * one_rounding
    assert drift(replay.naive, replay.weight) > 5 * one_rounding
    # What is kept is nearer than one rounding, and not exact.
    assert drift(remainder.exact(weight), replay.weight) < 0.3 * one_rounding


@pytest.mark.parametrize("dtype", HALVES)
@given(value=st.floats(width=32, allow_nan=False))
def test_a_number_is_kept_to_a_256th_of_the_spacing_in_the_nearest_weight(dtype, value):
    exact = torch.full((1, 1), value, dtype=torch.float32)
    weight, remainder = split(exact, dtype)
    nearest = exact.to(dtype)
    if not nearest.isfinite():
        assert weight.isinf().all()
        return
    assert (weight.double() - exact.double()).abs() == (nearest.double() - exact.double()).abs()
    kept = remainder.exact(weight)
    assert kept.dtype == torch.float32
    assert ((kept.double() - exact.double()).abs() <= spacing(weight) / 256).all()
    # Never beyond the weight that it is the error of: split again, it is the same.
    again, other = split(kept, dtype)
    assert torch.equal(again, weight)
    assert torch.equal(other.rounded_off, remainder.rounded_off)


@pytest.mark.parametrize("dtype", HALVES)
def test_the_errors_of_what_is_kept_are_without_bias(dtype):
    weight = torch.tensor([[1.25], [-1.5], [3.0]], dtype=dtype)
    # All distances in half a spacing on either side, as finely as float32 has them.
    steps = (1 << 15) if dtype == torch.bfloat16 else (1 << 12)
    distances = torch.arange(-steps + 1, steps) / (2 * steps)
    exact = (weight.double() + distances * spacing(weight)).float()
    rounded, remainder = split(exact, dtype)
    errors = (remainder.exact(rounded).double() - exact.double()) / spacing(weight)
    assert errors.abs().mean() > 1e-4
    assert (errors.mean(1).abs() < 2e-6).all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_merge_of_nothing_changes_no_bit(dtype, transposed):
    # Every number that the format has, zeros with both signs and infinities included, with errors of all sizes.
    numbers = torch.where(every_half(dtype).isnan(), 0, every_half(dtype))
    share = torch.rand(256, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5
    share[:, ::3] = 0
    weight, remainder = split((numbers.double() + share * spacing(numbers)).float(), dtype)
    remainder.transposed = transposed
    before, low = weight.view(torch.int16).clone(), remainder.rounded_off.clone()
    assert len(low.unique()) > 200
    assert {0, -(1 << 15)} <= set(before.flatten().tolist())
    skipped = torch.full((256, 3), torch.nan), torch.full((3, 256), torch.inf), torch.zeros(1, 3, dtype=torch.float64)
    zeros = torch.zeros(256, 3), torch.ones(3, 256), torch.ones(1, 3, dtype=torch.float64)
    for lora_B, lora_A, coefficients in (skipped, zeros):
        kernels.merge([remainder], [weight], [lora_B], [lora_A], coefficients)
        assert torch.equal(weight.view(torch.int16), before)
        assert torch.equal(remainder.rounded_off, low)


@pytest.mark.parametrize("dtype", HALVES)
def test_no_stored_pair_makes_a_finite_weight_infinite_or_nan(dtype):
    lows = torch.tensor([-128, -127, -65, -64, -1, 0, 1, 64, 127])
    weight = every_half(dtype).view(-1, 1).repeat(1, len(lows))
    remainder = EightBitRemainder(weight, transposed=False)
    remainder.rounded_off.copy_(lows.expand_as(weight))
    exact, finite = remainder.exact(weight), weight.isfinite()
    assert exact[finite].isfinite().all()
    assert exact[weight.isnan()].isnan().all()
    assert ((exact[finite].double() - weight[finite].double()).abs() <= spacing(weight[finite]) / 2).all()


def test_changes_far_below_a_spacing_add_up():
    for dtype in HALVES:
        weight = torch.ones(8, 8, dtype=dtype)
        remainder = EightBitRemainder(weight, transposed=False)
        step = torch.finfo(dtype).eps / 64
        for _ in range(128):
            remainder.add(weight, torch.full((8, 1), step), torch.ones(8, 1))
        assert (weight == 1 + 2 * torch.finfo(dtype).eps).all()
        # Less what is cut off next to the middle between two numbers.
        assert ((remainder.exact(weight).double() - weight).abs() <= torch.finfo(dtype).eps / 64).all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("interval", [1, 3])
def test_a_resumed_run_ends_with_the_same_bits(dtype, interval, tmp_path):
    alone, _ = trained("dense_8bit", 14, dtype, interval=interval)
    _, engine = trained("dense_8bit", 7, dtype, interval=interval)
    engine.save(tmp_path)
    state = scalora.saving.state_file.read_state(tmp_path)
    kept = [value for key, value in state["tensors"].items() if key.startswith("rounded_off.")]
    assert [value.dtype for value in kept] == [torch.int8] * 2
    assert all(value.any() for value in kept)
    resumed, _ = trained("dense_8bit", 14, dtype, state, interval)
    for key, value in alone.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_nothing_is_rounded_off_it_is_dense(dtype):
    one, other = (trained(merge, dtype=dtype)[0].state_dict() for merge in ("dense", "dense_8bit"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
def test_it_takes_one_byte_per_entry():
    model, engine = trained("dense_8bit")
    entries = sum(pair.weight.numel() for pair in engine.pairs)
    assert sum(value.nbytes for key, value in model.state_dict().items() if "rounded_off" in key) == entries
    of_dense = trained("dense")[1].state_dict()["tensors"]
    own = engine.state_dict()["tensors"]
    assert own.keys() == of_dense.keys()
    assert sum(t.nbytes for t in of_dense.values()) - sum(t.nbytes for t in own.values()) == entries


OTHERS = [("dense", "dense_8bit"), ("dense_8bit", "dense"), ("dense_8bit", "stochastic"), ("factored", "dense_8bit")]


@pytest.mark.parametrize(("saved", "present"), OTHERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_state_of_another_kind_is_refused_in_one_line(saved, present, dtype):
    state = copy.deepcopy(trained(saved, dtype=dtype)[1].state_dict())
    model, engine = trained(present, 0, dtype)
    before = copy.deepcopy(model.state_dict())
    state["config"] = None  # of a model that was saved without an engine
    with pytest.raises(StateError) as error:
        engine.load_state_dict(state)
    assert str(error.value) == (
        f"the state was saved with merge={saved!r}, but this model has merge={present!r}: set merge={saved!r}"
    )
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(("saved", "present"), OTHERS[:2])
def test_tensors_of_another_width_are_not_converted(saved, present, strict):
    tensors = trained(saved)[0].state_dict()
    model, _ = trained(present)
    kept = {key: value.clone() for key, value in model.state_dict().items() if "rounded_off" in key}
    kinds = (torch.int16, torch.int8) if saved == "dense" else (torch.int8, torch.int16)
    with pytest.raises(RuntimeError, match="is {}, but this model keeps rounding errors in {}".format(*kinds)) as error:
        model.load_state_dict(tensors, strict=strict)
    assert "Missing" not in str(error.value)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in kept.items())
    own = trained(present)[0].state_dict()
    model.load_state_dict(own, strict=strict)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in own.items())


@pytest.mark.parametrize("damage", [lambda low: low[:-1], lambda low: low.short()], ids=["shape", "dtype"])
def test_a_damaged_state_is_refused(damage):
    model, engine = trained("dense_8bit")
    state = copy.deepcopy(engine.state_dict())
    (name,) = (key for key in state["tensors"] if key.startswith("rounded_off.") and key.endswith("first"))
    state["tensors"][name] = damage(state["tensors"][name])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(StateError, match=f"'{name}' is torch.int"):
        engine.load_state_dict(state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_model_keeps_its_kind_and_auto_does_not_choose_it():
    model, engine = trained("dense_8bit", 0)
    engine.detach()
    ScaLora(model, torch.optim.AdamW(trainable(model))).detach()
    assert all(type(pair.remainder) is EightBitRemainder for pair in find_lora_pairs(model))
    with pytest.raises(UnsupportedLayerError, match="already has a dense_8bit remainder; set merge='dense_8bit'"):
        ScaLora(model, torch.optim.AdamW(trainable(model)), ScaLoraConfig(merge="dense"))
    model, _ = trained("auto", 0)
    assert all(type(pair.remainder) is DenseRemainder for pair in find_lora_pairs(model))


@pytest.mark.parametrize("dtype", HALVES)
def test_a_conversion_keeps_what_was_rounded_off_and_merges_go_on(dtype):
    model, engine = trained("dense_8bit", dtype=dtype)
    pair = engine.pairs[0]
    exact = pair.remainder.exact(pair.weight)
    before, low = pair.weight.clone(), pair.remainder.rounded_off.clone()
    assert low.any()
    model.float()
    weight = pair.layer.get_base_layer().weight
    assert torch.equal(weight, exact)
    assert pair.remainder.rounded_off is None
    model.to(dtype)
    weight = pair.layer.get_base_layer().weight
    assert torch.equal(weight, before)
    assert torch.equal(pair.remainder.rounded_off, low)
    pair.remainder.add(weight, torch.ones(16, 1), torch.ones(12, 1))
    change = pair.remainder.exact(weight).double() - exact.double()
    assert ((change - 1).abs() <= spacing(weight) / 256).all()


def test_embeddings_and_transposed_weights_take_merges():
    model = with_adapter_in_float32(
        with_lora(Mixed(), r=2, target_modules=["embed", "conv", "linear"], random_B=False).bfloat16()
    )
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    engine = ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=1, merge="dense_8bit"))
    assert any(pair.transposed for pair in engine.pairs)
    wanted = []
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        for parameter in trainable(model):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        if seed == 0:
            wanted = [pair.oriented(pair.weight).clone() for pair in engine.pairs]
    for pair, old in zip(engine.pairs, wanted, strict=True):
        assert not torch.equal(pair.oriented(pair.weight), old)
        assert pair.remainder.rounded_off.shape == pair.weight.shape


@pytest.mark.slow
def test_exports_hold_the_exact_update(tmp_path):
    for pair, own in exports_hold(tmp_path, "dense_8bit", lambda pair: pair.remainder.exact(pair.weight)):
        assert type(pair.remainder) is EightBitRemainder
        assert torch.equal(pair.weight, own.weight)
        assert torch.equal(pair.remainder.rounded_off, own.remainder.rounded_off)
