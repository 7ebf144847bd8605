"""Where remainders go: a thousand merges against a float64 replay, quantised bases, the original model underneath."""

import pytest
import torch
from drift import drift, train
from models import TwoLayers, tiny_llama, trainable, with_lora
from torch import nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from scalora import ScaLora, ScaLoraConfig, UnsupportedLayerError
from scalora.maths.lowrank import compressed_products, factors_of_dense, factors_of_product, rank_for_tolerance
from scalora.rescale.remainder import DenseRemainder, FactoredRemainder, add_to_all

WIDTH = 96


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


def test_a_thousand_factored_merges_drift_less_than_a_ten_thousandth():
    engine, replay = train(torch.bfloat16, "factored", width=WIDTH, remainder_rank=WIDTH)
    assert engine.metrics()["scalora/rescales"] == 1000
    assert replay.layer.frozen_remainder.columns <= 2 * WIDTH
    assert drift(replay.live(), replay.weight) < 1e-4
    assert engine.metrics()["scalora/discarded"] < 1e-5


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


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base_trains_and_stays_as_it_is(kind, quantised):
    base = quantised(kind)
    assert any("4bit" in type(m).__name__ or "8bit" in type(m).__name__ for m in base.modules())
    model = with_lora(base, r=2, target_modules="all-linear", random_B=False).train()
    before = {name: p.clone() for name, p in model.state_dict().items() if "base_layer" in name}
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    for merge in ("dense", "stochastic"):
        with pytest.raises(UnsupportedLayerError, match="merge='factored'"):
            ScaLora(model, optimizer, ScaLoraConfig(merge=merge))
    engine = ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=2))
    tokens = torch.randint(0, 64, (8, 12), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(15):
        loss = model(input_ids=tokens, labels=tokens).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
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


@pytest.mark.parametrize("max_rank", [5, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_compressed_together_are_each_its_truncated_svd(dtype, max_rank):
    products = products_of_all_kinds(dtype)
    for (left, right), (new_left, new_right, discarded) in zip(
        products, compressed_products(products, rtol=1e-6, max_rank=max_rank), strict=True
    ):
        matrix = left.double() @ right.double().T
        U, values, Vh = torch.linalg.svd(matrix)
        rank = new_left.shape[1]
        assert rank == new_right.shape[1] <= max_rank
        left_out = values[rank:].norm()
        assert rank == max_rank or left_out <= 1e-6 * values.norm()
        best = (U[:, :rank] * values[:rank]) @ Vh[:rank]
        # What float32 rounds, of factors or of the Grams' singular values, is the size of everything's largest.
        close = {"rtol": 0, "atol": 3e-7 * float(values[0])}
        torch.testing.assert_close(new_left.double() @ new_right.double().T, best, **close)
        torch.testing.assert_close(discarded.sqrt(), left_out, rtol=1e-3, atol=3e-7 * float(values[0]))
        for factor in (new_left, new_right):
            torch.testing.assert_close(factor.double().T @ factor.double(), values[:rank].diag(), **close)
        assert (new_left.dtype, new_right.dtype) == (dtype, dtype)


def test_layers_that_are_full_are_compressed_together_and_the_others_left_alone():
    shapes, products = [(30, 40), (50, 20), (30, 40)], []
    generator = torch.Generator().manual_seed(0)
    remainders = [FactoredRemainder(m, n, 4, 3, dtype=torch.float32, device=torch.device("cpu")) for m, n in shapes]
    replay = [torch.zeros(m, n) for m, n in shapes]
    for columns in (3, 3, 3):
        # The last layer comes one round later.
        n_layers = 2 if not products else 3
        products = [
            (torch.randn(m, columns, generator=generator), torch.randn(n, columns, generator=generator))
            for m, n in shapes[:n_layers]
        ]
        lefts, rights = zip(*products, strict=True)
        add_to_all(remainders[:n_layers], [torch.empty(0)] * n_layers, lefts, rights)
        for total, (left, right) in zip(replay, products, strict=False):
            total += left @ right.T
    assert [remainder.columns for remainder in remainders] == [4, 4, 6]
    for remainder, total in zip(remainders, replay, strict=True):
        missing = (total - remainder.dense()).double()
        torch.testing.assert_close(remainder.discarded.double(), missing.square().sum(), rtol=1e-4, atol=1e-6)
