"""Where remainders go: a thousand merges against a float64 replay, quantised bases, the original model underneath."""

import pytest
import torch
from drift import drift, train
from models import TwoLayers, losses_of, tiny_llama, trainable, with_lora
from peft import PeftModel
from torch import nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from scalora import ScaLora, ScaLoraConfig, UnsupportedLayerError
from scalora.maths.lowrank import compressed_products, factors_of_dense, factors_of_product, rank_for_tolerance
from scalora.maths.scaling import scaling_of_grams
from scalora.maths.subspace import by_purification
from scalora.rescale.remainder import DenseRemainder, FactoredRemainder, add_to_all, compress_full

WIDTH = 96


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_thousand_dense_merges_in_half_precision_drift_no_more_than_one_rounding(dtype):
    engine, replay = train(dtype, "dense", width=WIDTH)
    assert engine.metrics()["scalora/rescales"] == 1000
    weight = replay.layer.base_layer.weight.detach()
    assert weight.dtype == dtype
    one_rounding = drift(replay.weight.to(dtype), replay.weight)
    assert drift(replay.live(), replay.weight) <= 1.001 * one_rounding
    assert drift(replay.naive, replay.weight) > 5 * one_rounding
    assert drift(replay.layer.frozen_remainder.exact(weight), replay.weight) < 1e-5


@pytest.mark.slow
def test_a_thousand_factored_merges_drift_less_than_a_ten_thousandth():
    engine, replay = train(torch.bfloat16, "factored", width=WIDTH, remainder_rank=WIDTH)
    assert engine.metrics()["scalora/rescales"] == 1000
    assert replay.layer.frozen_remainder.columns <= 2 * WIDTH
    assert drift(replay.live(), replay.weight) < 1e-4
    assert engine.metrics()["scalora/discarded"] < 1e-5


@pytest.mark.slow
def test_what_a_cap_discards_is_what_is_missing_and_is_reported():
    engine, replay = train(torch.bfloat16, "factored", width=WIDTH, steps=200, remainder_rank=8)
    with pytest.warns(UserWarning, match="remainder_rank=8 is too small"):
        metrics = engine.metrics()
    columns = replay.layer.frozen_remainder.columns
    assert 8 <= columns <= 16
    assert metrics["scalora/remainder_columns"] == columns
    kept = replay.layer.frozen_remainder.dense().double()
    missing = (replay.live() - replay.weight).norm() / kept.norm()
    assert metrics["scalora/discarded"] > 1e-3
    # Pieces of different compressions may point the same way or cancel: the sum of energies is their size, not exact.
    assert 0.2 * metrics["scalora/discarded"] < missing < 5 * metrics["scalora/discarded"]


@pytest.mark.slow
def test_the_original_model_is_underneath_a_factored_remainder_bit_for_bit():
    model = with_lora(tiny_llama(), r=2, target_modules="all-linear")
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=0, merge="factored"))
    tokens = torch.randint(0, 64, (4, 10), generator=torch.Generator().manual_seed(0))
    untouched = tiny_llama()(input_ids=tokens).logits
    for _ in range(50):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with model.disable_adapter():
        assert torch.equal(model(input_ids=tokens).logits, untouched)
    assert not torch.allclose(model(input_ids=tokens).logits, untouched, atol=1e-2)


@pytest.fixture
def quantised(tmp_path):
    def load(kind):
        model = tiny_llama(hidden_size=64, intermediate_size=64)
        model.save_pretrained(tmp_path / "base")
        quantisation = BitsAndBytesConfig(
            load_in_8bit=kind == "int8", load_in_4bit=kind == "nf4", bnb_4bit_quant_type="nf4"
        )
        return LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantisation, dtype="float32")

    return load


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base_trains_and_stays_as_it_is(kind, quantised):
    base = quantised(kind)
    assert any("4bit" in type(m).__name__ or "8bit" in type(m).__name__ for m in base.modules())
    model = with_lora(base, r=2, target_modules="all-linear", random_B=False).train()
    before = {name: p.clone() for name, p in model.state_dict().items() if "base_layer" in name}
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    for merge in ("dense", "dense_8bit", "stochastic"):
        with pytest.raises(UnsupportedLayerError, match="merge='factored'"):
            ScaLora(model, optimizer, ScaLoraConfig(merge=merge))
    engine = ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=2))
    tokens = torch.randint(0, 64, (8, 12), generator=torch.Generator().manual_seed(1))
    losses = losses_of(model, optimizer, tokens, 15)
    assert losses[-1] < losses[0] - 0.1
    assert engine.metrics()["scalora/merge_norm"] > 0
    after = model.state_dict()
    assert before
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("dtype", "width", "kind"),
    [
        (torch.float32, 2048, DenseRemainder),
        (torch.bfloat16, 64, DenseRemainder),  # 64 columns of factors would be larger than the weight
        (torch.bfloat16, 1024, FactoredRemainder),
    ],
)
def test_auto_goes_by_dtype_and_size(dtype, width, kind):
    model = with_lora(nn.Sequential(nn.Linear(width, width)), r=2, target_modules=["0"], random_B=False)
    model.base_model.model[0].base_layer.to(dtype)
    ScaLora(model, torch.optim.AdamW(trainable(model)))
    assert type(model.base_model.model[0].frozen_remainder) is kind


def test_a_model_keeps_its_place_for_remainders():
    model = with_lora(TwoLayers(), r=2, target_modules=["first"])
    ScaLora(model, torch.optim.AdamW(trainable(model)), ScaLoraConfig(merge="factored")).detach()
    ScaLora(model, torch.optim.AdamW(trainable(model))).detach()
    assert isinstance(model.base_model.model.first.frozen_remainder, FactoredRemainder)
    with pytest.raises(UnsupportedLayerError, match="already has a factored remainder"):
        ScaLora(model, torch.optim.AdamW(trainable(model)), ScaLoraConfig(merge="dense"))


@pytest.mark.parametrize("shape", [(40, 30), (30, 400)])
def test_factors_are_the_truncated_svd(shape):
    generator = torch.Generator().manual_seed(0)
    U, _ = torch.linalg.qr(torch.randn(shape[0], 30, generator=generator, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(shape[1], 30, generator=generator, dtype=torch.float64))
    values = 0.5 ** torch.arange(30, dtype=torch.float64)
    matrix = (U * values) @ V.T
    for factors in (factors_of_dense(matrix, 1e-3, 30), factors_of_product(U * values, V)):
        rank = rank_for_tolerance(factors, 1e-3)
        assert values[rank:].norm() <= 1e-3 * values.norm() < values[rank - 1 :].norm()
        kept = factors.truncated(rank)
        error = (matrix - (kept.left * kept.values) @ kept.right.T).norm()
        torch.testing.assert_close(error, values[rank:].norm(), rtol=1e-3, atol=0)
        torch.testing.assert_close(kept.discarded().sqrt(), error, rtol=1e-3, atol=0)
    assert len(factors_of_dense(matrix, 1e-9, 7).values) == 7
    assert rank_for_tolerance(factors_of_product(0 * U, V), 1e-3) == 0


def products_of_all_kinds(dtype):
    """Factors with 20 columns: of slowly and of fast decaying spectra, of low rank, zero, and badly scaled."""
    generator = torch.Generator().manual_seed(0)

    def random(rows, columns):
        return torch.randn(rows, columns, generator=generator, dtype=torch.float64)

    slow, fast = 0.9 ** torch.arange(20), 0.2 ** torch.arange(20)
    low_rank = torch.where(torch.arange(20) % 4 == 0, 1.0, 0.0)
    products = [
        (random(60, 20) * slow, random(90, 20)),
        (random(90, 20) * fast, random(60, 20)),
        (random(60, 20) * low_rank, random(60, 20) * low_rank),
        (random(60, 3) @ random(3, 20), random(80, 20)),
        (0 * random(60, 20), random(90, 20)),
        (1e-15 * random(60, 20), 1e8 * random(90, 20)),
        (random(12, 20), random(60, 20)),
    ]
    return [(left.to(dtype), right.to(dtype)) for left, right in products]


@pytest.fixture(params=["as on a CPU", "as on a GPU"])
def basis(request, monkeypatch):
    """The ways to find the subspace to keep, both on the CPU."""
    if request.param == "as on a GPU":
        monkeypatch.setattr("scalora.maths.lowrank.leading_subspace", by_purification)
    return request.param


@pytest.mark.parametrize("rank", [5, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_compressed_together_are_each_its_truncated_svd(dtype, rank, basis):
    products = products_of_all_kinds(dtype)
    compressed, discarded = compressed_products(products, rank)
    for (left, right), (new_left, new_right), left_out in zip(products, compressed, discarded, strict=True):
        matrix = left.double() @ right.double().T
        U, values, Vh = torch.linalg.svd(matrix, full_matrices=False)
        assert new_left.shape[1] == new_right.shape[1] == rank
        best = (U[:, :rank] * values[:rank]) @ Vh[:rank]
        # What float32 rounds, of factors or of the Grams' singular values, is the size of everything's largest.
        close = {"rtol": 0, "atol": 3e-7 * float(values[0])}
        torch.testing.assert_close(new_left.double() @ new_right.double().T, best, **close)
        torch.testing.assert_close(left_out.sqrt(), values[rank:].norm(), rtol=1e-3, atol=3e-7 * float(values[0]))
        norms = [factor.double().norm(dim=0) for factor in (new_left, new_right)]
        torch.testing.assert_close(*norms, rtol=1e-3, atol=1e-3 * float(values[0]) ** 0.5)
        if basis == "as on a CPU":
            torch.testing.assert_close(
                new_left.double().T @ new_left.double(), nn.functional.pad(values, (0, rank))[:rank].diag(), **close
            )
        assert (new_left.dtype, new_right.dtype) == (dtype, dtype)


SPECTRA = {
    "flat": lambda i: torch.ones(40),
    "slow": lambda i: 0.99**i,
    "geometric": lambda i: 0.7**i,
    "fast": lambda i: 0.1**i,
    "of low rank": lambda i: torch.where(i < 5, 0.5**i, 0),
    "of just the rank that is kept": lambda i: torch.where(i < 16, 0.8**i, 0),
    "of one more": lambda i: torch.where(i < 17, 1.0, 0),
    "clustered": lambda i: torch.where(i < 8, 3.0, torch.where(i < 24, 1 + 1e-4 * i, 0.1)),
    "clustered far below the largest": lambda i: torch.where(i < 15, 1.0, 1e-5 * (1 + 1e-3 * i)),
    "a few of many equal ones": lambda i: torch.where(i < 15, 1e5, torch.where(i < 20, 1.0, 0)),
    "zero": torch.zeros_like,
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("aligned", [False, True])
def test_what_is_left_out_is_the_least_possible(spectrum, aligned, basis):
    generator = torch.Generator().manual_seed(0)

    def orthonormal(rows):
        return torch.linalg.qr(torch.randn(rows, 40, generator=generator, dtype=torch.float64))[0]

    values, mixing = SPECTRA[spectrum](torch.arange(40.0, dtype=torch.float64)).double(), orthonormal(40)
    left, right = orthonormal(50) * values, orthonormal(60)
    if not aligned:  # the columns of the factors are then combinations of the singular vectors
        left, right = left @ mixing, right @ mixing
    [(new_left, new_right)], discarded = compressed_products([(left, right)], 16)
    error = (left @ right.T - new_left @ new_right.T).norm()
    noise = 3e-7 * values.max()
    least = values.sort(descending=True).values[16:].norm()
    assert error <= 1.001 * least + noise
    torch.testing.assert_close(discarded[0].sqrt(), error, rtol=1e-3, atol=float(noise))


def remainders_of(shapes, max_rank, r):
    return [FactoredRemainder(m, n, max_rank, r, dtype=torch.float32, device=torch.device("cpu")) for m, n in shapes]


def test_layers_that_are_full_are_compressed_together_and_the_others_left_alone(basis):
    shapes, replay = [(30, 40), (50, 20), (30, 40)], []
    generator = torch.Generator().manual_seed(0)
    remainders = remainders_of(shapes, 4, 3)
    replay = [torch.zeros(m, n) for m, n in shapes]
    for added in range(3):
        # The last layer comes one round later.
        for remainder, total in list(zip(remainders, replay, strict=True))[: 3 if added else 2]:
            left, right = (torch.randn(rows, 3, generator=generator) for rows in total.shape)
            remainder.make_room(3)
            add_to_all([remainder], [torch.empty(0)], left[None], right[None])
            total += left @ right.T
        compress_full(remainders)
    assert [remainder.columns for remainder in remainders] == [4, 4, 6]
    for remainder, total in zip(remainders, replay, strict=True):
        missing = (total - remainder.dense()).double()
        torch.testing.assert_close(remainder.discarded.double(), missing.square().sum(), rtol=1e-4, atol=1e-6)
        assert not remainder.left[:, remainder.columns :].any()
        assert not remainder.right[:, remainder.columns :].any()


def test_layers_of_one_shape_are_added_to_together():
    generator = torch.Generator().manual_seed(0)
    together, alone = (remainders_of([(30, 40)] * 3, 8, 3) for _ in range(2))
    for _ in range(2):
        lefts, rights = (torch.randn(3, rows, 3, generator=generator) for rows in (30, 40))
        for remainder in together:
            remainder.make_room(3)
        add_to_all(together, [torch.empty(0)] * 3, lefts, rights)
        for remainder, left, right in zip(alone, lefts, rights, strict=True):
            remainder.add(torch.empty(0), left, right)
    for one, other in zip(together, alone, strict=True):
        assert one.columns == other.columns == 6
        assert torch.equal(one.dense(), other.dense())
        assert one.dense().norm() > 1


def test_a_compression_keeps_no_more_columns_than_the_weight_has_rows_or_columns():
    generator = torch.Generator().manual_seed(0)
    (remainder,), total = remainders_of([(5, 40)], 8, 3), torch.zeros(5, 40)
    for _ in range(6):
        left, right = torch.randn(5, 3, generator=generator), torch.randn(40, 3, generator=generator)
        remainder.add(torch.empty(0), left, right)
        total += left @ right.T
    assert remainder.columns == 5
    torch.testing.assert_close(remainder.dense(), total)
    assert remainder.discarded < 1e-10


def test_columns_that_add_nothing_are_not_in_the_adapter_that_is_saved(tmp_path):
    model = with_lora(TwoLayers(), r=3, target_modules=["first", "second"])
    engine = ScaLora(model, torch.optim.AdamW(trainable(model)), ScaLoraConfig(merge="factored", remainder_rank=5))
    generator = torch.Generator().manual_seed(0)
    for pair in engine.pairs:
        left, right = torch.randn(pair.m, 1, generator=generator), torch.randn(pair.n, 1, generator=generator)
        for scale in (1, -0.5, 2, 0):  # of rank 1, in twelve columns, of which three are zero
            pair.remainder.add(pair.weight, *(factor.expand(-1, 3).contiguous() for factor in (scale * left, right)))
        assert pair.remainder.columns == 5
        torch.testing.assert_close(pair.remainder.dense(), 7.5 * left @ right.T)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(TwoLayers(), tmp_path)
    assert loaded.peft_config["default"].r == 3 + 1
    x = torch.randn(4, 12, generator=generator)
    torch.testing.assert_close(loaded(x), model.eval()(x))


def test_rescales_that_end_in_an_error_leave_room_for_later_ones():
    """As when memory runs out and the user's loop leaves the batch out."""
    fails = True

    def rule(grams, **settings):
        if fails:
            raise MemoryError("out of memory")
        return scaling_of_grams(grams, **settings)

    model = with_lora(TwoLayers(), r=3, target_modules=["first", "second"])
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    config = ScaLoraConfig(warmup_steps=0, merge="factored", remainder_rank=3)
    engine = ScaLora(model, optimizer, config, scaling_rule=rule)
    x = torch.randn(4, 12)
    before = model(x)
    for _ in range(5):
        model(x).square().mean().backward()
        with pytest.raises(MemoryError):
            optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(model(x), before)
    fails = False
    for _ in range(5):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert engine.pairs[0].remainder.columns <= 6
    assert model(x).square().mean() < before.square().mean()
