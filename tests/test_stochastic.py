"""Stochastic merges: unbiased, to a neighbour, without memory, and the same numbers wherever and whenever."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import Mixed, TwoLayers, take_random_steps, tiny_llama, trainable, with_adapter_in_float32, with_lora
from test_rescale_cost import Operations
from torch import nn

import scalora
from scalora import ScaLora, ScaLoraConfig, StateError, UnsupportedLayerError
from scalora.model.adapters import find_lora_pairs
from scalora.rescale import kernels
from scalora.rescale.remainder import DenseRemainder
from scalora.rescale.stochastic import StochasticRemainder, draws, rounded_by

HALVES = [torch.bfloat16, torch.float16]


def merged(weight, change, step=1, name="layer"):
    """A copy of the weight after a merge of a change that is alike in all entries."""
    own = weight.clone()
    remainder = StochasticRemainder(own, transposed=False, name=name)
    remainder.step = step
    remainder.add(own, torch.full((len(own), 1), change), torch.ones(own.shape[1], 1))
    return own


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 7e4 / 3, 1e-5])
@pytest.mark.parametrize("share", [0.003, 0.3, 0.5])
def test_the_mean_of_many_merges_is_the_exact_sum(dtype, magnitude, share):
    generator = torch.Generator().manual_seed(0)
    weight = ((1 + torch.rand(64, 64, generator=generator)) * magnitude).to(dtype)
    weight *= torch.where(torch.rand(64, 64, generator=generator) < 0.5, -1, 1).to(dtype)
    # A share of the spacing: what rounding to nearest would lose each time, or merge whole.
    spacing = max(torch.finfo(dtype).eps * magnitude, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)
    change = torch.tensor(share * spacing, dtype=torch.float32).item()
    exact = weight.float() + change
    errors = torch.stack([merged(weight, change, step).double() - exact.double() for step in range(100)])
    standard_error = errors.std() / errors.numel() ** 0.5
    assert standard_error > 0
    assert errors.mean().abs() < 3 * standard_error
    # A walk of the whole, not of each half of it.
    assert errors[:, weight > 0].mean().abs() < 3 * 2**0.5 * standard_error


@pytest.mark.parametrize("dtype", HALVES)
@given(value=st.floats(width=32, allow_nan=False), draw=st.integers(0, 0xFFFF))
def test_a_number_is_rounded_to_one_of_its_two_neighbours(dtype, value, draw):
    exact = torch.tensor([[value]], dtype=torch.float32)
    rounded = rounded_by(exact, torch.full((1, 1), 5.0, dtype=dtype), torch.tensor([[draw]], dtype=torch.int32))
    assert rounded.dtype == dtype
    nearest = exact.to(dtype)
    if nearest.float() == exact or exact.isinf():
        assert torch.equal(rounded, nearest)
        return
    side = torch.tensor(torch.inf if nearest.float() < exact else -torch.inf, dtype=dtype)
    other = torch.nextafter(nearest.cpu(), side.expand(1, 1))
    assert rounded.item() in (nearest.item(), other.item())
    low, high = sorted((nearest.double().item(), other.double().item()))
    if abs(low) < float("inf") and abs(high) < float("inf"):
        # Up with as many of the draws as the share of the interval, to 16 bits.
        share = (abs(value) - min(abs(low), abs(high))) / (high - low)
        assert (abs(rounded.item()) == max(abs(low), abs(high))) == (draw + int(share * 65536) >= 65536)


def test_nan_and_infinite_sums_stay_what_they_are():
    for dtype in HALVES:
        weight = torch.tensor([[torch.nan, torch.inf, -torch.inf, 1.0, 1.0]], dtype=dtype)
        expected = torch.tensor([[torch.nan, torch.inf, -torch.inf, 1.0, 1.0]], dtype=dtype)
        assert torch.equal(merged(weight, 2.0**-40)[0, 1:3], expected[0, 1:3])
        assert merged(weight, 2.0**-40)[0, 0].isnan()
        assert merged(weight, torch.nan).isnan().all()
        assert merged(weight, torch.inf)[0, 3].isinf()


def test_draws_are_uniform_and_unrelated_between_entries_layers_and_steps():
    weight, count = torch.empty(256, 256), 256 * 256
    of = {
        (name, step): draws(name, step, 0, weight).double() for name in (0, 1, 0x9E3779B9) for step in (0, 1, 2, 1000)
    }
    for numbers in of.values():
        assert 0 <= numbers.min() < 16
        assert 0x10000 - 16 <= numbers.max() < 0x10000
        assert (numbers.mean() / 0xFFFF - 0.5).abs() < 4 / (12 * count) ** 0.5
        # Each of the 16 bits is set in half of the entries.
        for bit in range(16):
            assert ((numbers.int() >> bit & 1).double().mean() - 0.5).abs() < 5 / (4 * count) ** 0.5
    series = [numbers.flatten() for numbers in of.values()]
    first = of[0, 0]
    series += [first.roll(1, 0).flatten(), first.roll(1, 1).flatten(), first.mT.flatten(), first.flip(0).flatten()]
    correlations = torch.corrcoef(torch.stack(series)) - torch.eye(len(series))
    assert correlations.abs().max() < 5 / count**0.5


def test_rows_draw_the_same_in_whichever_block_they_are():
    weight = torch.empty(300, 40)
    assert torch.equal(draws(7, 3, 100, weight[100:250]), draws(7, 3, 0, weight)[100:250])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_rescale_that_is_skipped_changes_no_bit(dtype, transposed):
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(256, 256)
    weight = bits.view(dtype).clone()
    remainder = StochasticRemainder(weight, transposed=transposed, name="layer")
    lora_B, lora_A = torch.full((256, 3), torch.nan), torch.full((3, 256), torch.inf)
    kernels.merge([remainder], [weight], [lora_B], [lora_A], torch.zeros(1, 3, dtype=torch.float64))
    assert torch.equal(weight.view(torch.int16), bits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_nothing_is_rounded_off_it_is_dense(dtype):
    results = []
    for merge in ("dense", "stochastic"):
        model, _ = trained(merge, dtype=dtype)
        results.append(model.state_dict())
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def trained(merge, steps=12, dtype=torch.bfloat16, state=None, interval=1):
    """The model and engine after some steps of a plain loop, from the start or from a state."""
    model = with_lora(TwoLayers(), r=3, target_modules=["first", "second"], random_B=False)
    for pair in find_lora_pairs(model):
        pair.layer.get_base_layer().to(dtype)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    engine = ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=2, merge=merge, interval=interval))
    if state is not None:
        engine.load_state_dict(copy.deepcopy(state))
    for step in range(engine.step, steps):
        x = torch.randn(16, 12, generator=torch.Generator().manual_seed(step))
        with torch.autocast("cpu", dtype, enabled=dtype in HALVES):
            output = model(x if dtype != torch.float64 else x.double())
        nn.functional.mse_loss(output.float(), x[:, :6].sin()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, engine


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("interval", [1, 3])
def test_a_resumed_run_ends_with_the_same_bits(dtype, interval, tmp_path):
    alone, _ = trained("stochastic", 14, dtype, interval=interval)
    before, engine = trained("stochastic", 7, dtype, interval=interval)
    engine.save(tmp_path)
    assert not torch.equal(before.base_model.model.first.base_layer.weight, TwoLayers().first.weight.to(dtype))
    state = scalora.saving.state_file.read_state(tmp_path)
    resumed, engine = trained("stochastic", 14, dtype, state, interval)
    assert engine.step == 14
    for key, value in alone.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key


def test_layers_draw_their_own_numbers_and_a_copy_the_same():
    model, _ = trained("stochastic", 0)
    first, second = (pair.remainder.name_hash for pair in find_lora_pairs(model))
    assert first != second
    again, _ = trained("stochastic", 0)
    assert [pair.remainder.name_hash for pair in find_lora_pairs(again)] == [first, second]
    assert [pair.remainder.name_hash for pair in find_lora_pairs(copy.deepcopy(model))] == [first, second]


@pytest.mark.slow
def test_no_memory_of_the_weights_size_is_taken():
    weight = torch.zeros(1 << 9, 1 << 13, dtype=torch.bfloat16)
    remainder = StochasticRemainder(weight, transposed=False, name="layer")
    with Operations() as operations:
        remainder.add(weight, torch.ones(len(weight), 1), torch.ones(weight.shape[1], 1))
    assert operations.largest <= weight.numel() // 4
    assert (weight == 1).all()
    assert not list(remainder.buffers())
    model, engine = trained("stochastic")
    assert not [key for key in model.state_dict() if "rounded_off" in key]
    tensors = engine.state_dict()["tensors"]
    assert {key.partition(".")[0] for key in tensors} == {"trained", "weight"}
    dense = trained("dense")[1].state_dict()["tensors"]
    # What dense keeps beside each entry.
    kept = sum(value.nbytes for key, value in dense.items() if key.startswith("rounded_off."))
    assert sum(t.nbytes for t in dense.values()) - sum(t.nbytes for t in tensors.values()) == kept > 0


@pytest.mark.parametrize(
    ("saved", "present"), [("dense", "stochastic"), ("stochastic", "dense"), ("stochastic", "factored")]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_state_of_another_kind_is_refused_in_one_line(saved, present, dtype):
    state = copy.deepcopy(trained(saved, dtype=dtype)[1].state_dict())
    model, engine = trained(present, 0, dtype)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(StateError, match=f"merge='{saved}'.*merge='{present}'.*use the same settings"):
        engine.load_state_dict(state)
    state["config"] = None  # of a model that was saved without an engine
    with pytest.raises(StateError) as error:
        engine.load_state_dict(state)
    assert str(error.value) == (
        f"the state was saved with merge={saved!r}, but this model has merge={present!r}: set merge={saved!r}"
    )
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_model_keeps_its_kind_and_auto_does_not_choose_it():
    model, engine = trained("stochastic", 0)
    engine.detach()
    ScaLora(model, torch.optim.AdamW(trainable(model))).detach()
    assert all(type(pair.remainder) is StochasticRemainder for pair in find_lora_pairs(model))
    with pytest.raises(UnsupportedLayerError, match="already has a stochastic remainder; set merge='stochastic'"):
        ScaLora(model, torch.optim.AdamW(trainable(model)), ScaLoraConfig(merge="dense"))
    model, _ = trained("auto", 0)
    assert all(type(pair.remainder) is DenseRemainder for pair in find_lora_pairs(model))


def test_a_tied_weight_and_weight_decay_of_pairs_are_refused_as_for_dense():
    model = with_lora(tiny_llama(tie_word_embeddings=True), r=2, target_modules=["lm_head"])
    with pytest.raises(UnsupportedLayerError, match=r"is tied .* set merge='factored'"):
        ScaLora(model, torch.optim.AdamW(trainable(model)), ScaLoraConfig(merge="stochastic"))
    model = with_lora(TwoLayers(), r=2, target_modules=["first"], random_B=False)
    optimizer = scalora.PairAdamW(model, weight_decay=0.1)
    with pytest.raises(scalora.UnsupportedOptimizerError, match="merge='factored'"):
        ScaLora(model, optimizer, ScaLoraConfig(mode="matrix", merge="stochastic"))


def test_embeddings_and_transposed_weights_take_merges():
    model = with_adapter_in_float32(
        with_lora(Mixed(), r=2, target_modules=["embed", "conv", "linear"], random_B=False).bfloat16()
    )
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    engine = ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=1, merge="stochastic"))
    before = [pair.weight.clone() for pair in engine.pairs]
    assert any(pair.transposed for pair in engine.pairs)
    take_random_steps(model, optimizer, 6)
    assert all(not torch.equal(pair.weight, old) for pair, old in zip(engine.pairs, before, strict=True))


def test_a_conversion_rounds_once_and_merges_go_on():
    model, engine = trained("stochastic")
    pair = engine.pairs[0]
    before = pair.weight.clone()
    model.float()
    assert torch.equal(pair.layer.get_base_layer().weight, before.float())
    model.bfloat16()
    assert torch.equal(pair.layer.get_base_layer().weight, before)
    assert pair.remainder.rounded_off is None
    weight = pair.layer.get_base_layer().weight
    pair.remainder.add(weight, torch.ones(16, 1), torch.ones(12, 1))
    assert ((weight.float() - before.float() - 1).abs() <= torch.finfo(torch.bfloat16).eps * 2).all()


def exports_hold(folder, merge, exact):
    """Check the exports of a run against its `exact` weights; returns the layers of the saved run and of the run."""
    base = tiny_llama(tie_word_embeddings=False).bfloat16()
    model = with_adapter_in_float32(
        with_lora(copy.deepcopy(base), r=2, target_modules="all-linear", random_B=False, dtype=torch.bfloat16)
    )
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    engine = ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=0, merge=merge))
    take_random_steps(model, optimizer, 6)
    model.save_pretrained(folder / "saved")
    scalora.export_adapter(copy.deepcopy(base), folder / "saved", folder / "adapter", rtol=1e-5)
    merged_model = scalora.export_merged(copy.deepcopy(base), folder / "saved", folder / "merged")
    weights = dict(merged_model.named_parameters())
    for pair in engine.pairs:
        key = pair.name.removeprefix("base_model.model.") + ".weight"
        wanted = exact(pair).double() + pair.scaling * pair.lora_B.double() @ pair.lora_A.double()
        assert (weights[key].double() - wanted).norm() < 1e-6 * wanted.norm()
    again = scalora.load_model(copy.deepcopy(base), folder / "saved")
    return zip(find_lora_pairs(again), engine.pairs, strict=True)


@pytest.mark.slow
def test_exports_hold_the_update_of_the_rounded_weights(tmp_path):
    for pair, own in exports_hold(tmp_path, "stochastic", lambda pair: pair.weight):
        assert type(pair.remainder) is StochasticRemainder
        assert torch.equal(pair.weight, own.weight)
