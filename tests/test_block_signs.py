"""Block signs against their definition, and as PEFT adapters: rank, training, ordinary files, resume, refusals."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Mixed, TwoLayers, losses_of, tiny_gpt2, tiny_llama, trainable
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils.hotswap import hotswap_adapter
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.functional import linear
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from scalora import BlockSignsCallback, PairAdamW, ScaLora, ScaLoraConfig, UnsupportedLayerError, add_block_signs
from scalora.maths.block_signs import (
    add_signed_linear,
    block_signs,
    blocks_of,
    compact_A,
    compact_B,
    expanded_A,
    expanded_B,
    product_with_A,
    product_with_B,
)
from scalora.model.adapters import find_lora_pairs
from scalora.model.made_factor import MadeFactorError
from scalora.model.signed_factors import SignedB, SignedFactor
from scalora.rivals.block_signs import BlockSigns


def signs_by_definition(m, n, blocks):
    """S itself: Sylvester's Hadamard matrix, whose rows and columns are repeated for all entries of their parts."""
    C = torch.ones(1, 1)
    while len(C) < blocks:
        C = torch.cat([torch.cat([C, C], 1), torch.cat([C, -C], 1)])
    k_out, k_in = math.gcd(m, blocks), math.gcd(n, blocks)
    return C[:k_out, :k_in].repeat_interleave(m // k_out, 0).repeat_interleave(n // k_in, 1).double()


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


sides = st.sampled_from([2, 4, 6, 8, 12, 24, 32, 40, 64])
powers = st.sampled_from([2, 4, 8, 16, 32])


@settings(max_examples=60, deadline=None)
@given(m=sides, n=sides, r=st.integers(1, 5), blocks=powers, batch=st.sampled_from([(), (3,), (0,), (2, 5)]))
def test_all_forms_are_the_definition(m, n, r, blocks, batch):
    signs = block_signs(m, n, blocks, dtype=torch.float64)
    A, B, x = normal(r, n, seed=1), normal(m, r, seed=2), normal(*batch, n, seed=3)
    update = signs_by_definition(m, n, blocks) * (B @ A)
    parts = signs.shape[1]
    in_two_products = product_with_B(product_with_A(x, A, parts), B, signs)
    torch.testing.assert_close(in_two_products, x @ update.mT, rtol=1e-11, atol=1e-11)
    for result in (normal(*batch, m, seed=4), normal(m, *batch, seed=4).movedim(0, -1)):
        expected = result + 1.5 * x @ update.mT
        torch.testing.assert_close(add_signed_linear(result, x, A, B, signs, 1.5), expected, rtol=1e-11, atol=1e-11)
    big_A, big_B = expanded_A(A, parts), expanded_B(B, signs)
    torch.testing.assert_close(big_B @ big_A, update, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(product_with_A(x, A, parts), x @ big_A.mT, rtol=1e-11, atol=1e-11)
    assert torch.equal(compact_A(big_A, parts), A)
    assert torch.equal(compact_B(big_B, parts), B)


@pytest.mark.parametrize(("m", "n"), [(1, 8), (9, 8), (8, 15), (7, 5)])
def test_a_side_that_cannot_be_divided_has_no_signs(m, n):
    assert block_signs(m, n, 8) is None


def test_the_update_has_as_many_times_the_rank_and_a_small_norm():
    A, B = normal(4, 128, seed=1), normal(128, 4, seed=2)
    update = expanded_B(B, block_signs(128, 128, 16, dtype=torch.float64)) @ expanded_A(A, 16)
    assert torch.linalg.matrix_rank(update) == 64
    assert torch.linalg.matrix_rank(B @ A) == 4
    torch.testing.assert_close(update.norm(), (B @ A).norm(), rtol=1e-12, atol=0)
    assert torch.linalg.matrix_norm(update, 2) < 0.5 * torch.linalg.matrix_norm(B @ A, 2)


def signed_model(model, blocks=4, *, trained=False, **lora):
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(**lora))
    add_block_signs(adapted, blocks)
    if trained:
        torch.manual_seed(1)
        for parameter in trainable(adapted):
            nn.init.normal_(parameter, std=0.3)
    return adapted


def test_training_is_that_of_lora_in_the_space_of_signed_weights():
    """A loss of S ⊙ W with plain LoRA is the same loss of W with signs: all gradients and all steps are equal."""
    S, x, y = signs_by_definition(24, 16, 8), normal(40, 16, seed=4), normal(40, 24, seed=5)
    base = nn.Linear(16, 24, bias=False).double()

    class InSignedSpace(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 24, bias=False).double()
            self.layer.weight.data.copy_(S * base.weight.data)

        def forward(self, x):
            return self.layer(x)

    plain = get_peft_model(InSignedSpace(), LoraConfig(r=3, lora_alpha=6, target_modules=["layer"])).double()
    signed = signed_model(nn.Sequential(base), 8, r=3, lora_alpha=6, target_modules=["0"]).double()
    for one, other in zip(trainable(signed), trainable(plain), strict=True):
        one.data.copy_(other.data)
    optimizers = [PairAdamW(model, lr=1e-2) for model in (signed, plain)]
    for _ in range(20):
        (signed(x) - y).square().mean().backward()
        layer = plain.base_model.model.layer
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        weight = S * (layer.base_layer.weight + 2 * B @ A)
        (linear(x, weight) - y).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for one, other in zip(trainable(signed), trainable(plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    assert trainable(signed)[1].abs().max() > 0.01


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_layer_computes_its_definition_and_has_its_gradients(kind):
    model = nn.Sequential(nn.Linear(12, 16)) if kind == "linear" else tiny_gpt2().transformer.h[0].mlp
    name = "0" if kind == "linear" else "c_fc"
    transposed = {"fan_in_fan_out": True} if kind == "conv1d" else {}
    adapted = signed_model(model.double(), trained=True, r=2, lora_alpha=6, target_modules=[name], **transposed)
    adapted = adapted.double()
    layer = adapted.get_submodule(f"base_model.model.{name}")
    weight = layer.base_layer.weight if kind == "linear" else layer.base_layer.weight.mT
    A, B = trainable(adapted)
    assert A.shape == (2, weight.shape[1])
    assert B.shape == (weight.shape[0], 2)
    x = normal(3, 5, weight.shape[1], seed=6).requires_grad_()
    expected = linear(x, weight + 3 * signs_by_definition(*weight.shape, 4) * (B @ A), layer.base_layer.bias)
    output, grad = layer(x), normal(3, 5, weight.shape[0], seed=7)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    for found, wanted in zip(*(torch.autograd.grad(y, [x, A, B], grad) for y in (output, expected)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    # PEFT's own forward pass, with several adapters for instance, goes by the modules.
    super_output = type(layer).__bases__[1].forward(layer, x)
    torch.testing.assert_close(super_output, expected, rtol=1e-12, atol=1e-12)


def test_it_starts_as_the_base_with_loras_parameters_and_its_optimizers_state():
    base, lora = tiny_llama(), {"r": 2, "target_modules": "all-linear"}
    plain, signed = get_peft_model(copy.deepcopy(base), LoraConfig(**lora)), signed_model(base, 8, **lora)
    tokens = torch.randint(0, 64, (2, 9))
    assert torch.equal(signed(input_ids=tokens).logits, base(input_ids=tokens).logits)
    assert [p.shape for p in trainable(signed)] == [p.shape for p in trainable(plain)]
    for model in (plain, signed):
        optimizer = PairAdamW(model)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        model.state_numbers = sum(t.numel() for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t))
        model.default_rate = optimizer.defaults["lr"]
    assert signed.state_numbers == plain.state_numbers
    assert signed.default_rate == 2 * plain.default_rate


@pytest.mark.parametrize("optimizer", ["PairAdamW", "AdamW"])
def test_training_lowers_the_loss_and_fills_the_rank(optimizer):
    base = tiny_llama(hidden_size=64, intermediate_size=128)
    adapted = signed_model(base, 16, r=2, lora_alpha=2, target_modules="all-linear")
    optimizer = PairAdamW(adapted, lr=3e-3) if optimizer == "PairAdamW" else torch.optim.AdamW(trainable(adapted), 1e-2)
    tokens = torch.randint(0, 64, (8, 12), generator=torch.Generator().manual_seed(0))
    losses = losses_of(adapted, optimizer, tokens, 8)
    assert losses[-1] < losses[0] - 0.1
    merged = adapted.merge_and_unload()
    update = (merged.model.layers[0].mlp.up_proj.weight - base.model.layers[0].mlp.up_proj.weight).double()
    assert torch.linalg.matrix_rank(update, rtol=1e-3) == 32


def outputs(model, seed=0):
    model.eval()
    tokens = torch.randint(0, 64, (3, 10), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(input_ids=tokens).logits


@pytest.mark.parametrize("rslora", [False, True])
def test_what_is_saved_is_an_ordinary_adapter(tmp_path, rslora):
    base = tiny_llama()
    config = LoraConfig(r=2, lora_alpha=6, target_modules="all-linear", use_rslora=rslora)
    adapted = get_peft_model(copy.deepcopy(base), config)
    add_block_signs(adapted, 8)
    for parameter in trainable(adapted):
        nn.init.normal_(parameter, std=0.3)
    assert config.r == 2, "the user's object"
    assert adapted.peft_config["default"].r == 16
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert loaded.peft_config["default"].r == 16
    assert not loaded.peft_config["default"].rank_pattern
    torch.testing.assert_close(outputs(loaded), outputs(adapted), rtol=1e-4, atol=1e-5)
    layer = loaded.base_model.model.model.layers[0].self_attn.k_proj
    assert type(layer.lora_A["default"]) is nn.Linear
    assert layer.lora_A["default"].weight.shape == (16, 32)


def test_layers_of_other_kinds_and_odd_sizes_stay_plain_and_the_file_says_so(tmp_path):
    class Odd(Mixed):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(10, 15)
            self.last = nn.Linear(15, 12)
            self.even = nn.Linear(12, 12)

        def forward(self, tokens):
            return self.head(self.even(self.last(torch.tanh(self.linear(self.conv1d(self.embed(tokens)))))))

    names = ["embed", "conv1d", "linear", "last", "even"]
    adapted = signed_model(Odd(), 4, trained=True, r=2, lora_alpha=2, target_modules=names)
    ranks = {name: adapted.get_submodule(f"base_model.model.{name}").r["default"] for name in names}
    assert ranks == {"embed": 2, "conv1d": 8, "linear": 2, "last": 2, "even": 8}
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Odd(), tmp_path)
    tokens = torch.randint(0, 20, (2, 5))
    torch.testing.assert_close(loaded(tokens), adapted(tokens), rtol=1e-4, atol=1e-5)


def test_training_goes_on_from_a_saved_adapter_to_the_bit(tmp_path):
    base, lora = tiny_llama(), {"r": 2, "target_modules": "all-linear"}
    adapted = signed_model(base, 8, trained=True, **lora)
    adapted.save_pretrained(tmp_path)
    resumed = signed_model(base, 8, **lora)
    resumed.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(outputs(resumed), outputs(adapted))
    for one, other in zip(trainable(resumed), trainable(adapted), strict=True):
        assert torch.equal(one, other)
    again = signed_model(base, 8, **lora)
    again.load_state_dict(adapted.state_dict())
    assert torch.equal(outputs(again), outputs(adapted))


@pytest.mark.parametrize("given", [None, 8])
@pytest.mark.parametrize("trained", [True, False])
def test_a_loaded_adapter_that_has_signs_goes_on_with_them(tmp_path, given, trained):
    base = tiny_llama(intermediate_size=36)  # 36 is divided into four parts, not into eight
    adapted = signed_model(base, 8, trained=trained, r=2, lora_alpha=6, target_modules="all-linear")
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    optimizers = [torch.optim.AdamW(trainable(model), 1e-2) for model in (adapted, loaded)]
    add_block_signs(loaded, given)
    for one, other in zip(trainable(loaded), trainable(adapted), strict=True):
        assert torch.equal(one, other)
    if not trained and given is None:
        return  # of an update of zero, the number of blocks is not known in all layers
    tokens = torch.randint(0, 64, (4, 8))
    for model, optimizer in zip((adapted, loaded), optimizers, strict=True):
        assert losses_of(model, optimizer, tokens, 3)[-1] > 0
    for one, other in zip(trainable(loaded), trainable(adapted), strict=True):
        assert torch.equal(one, other)
    configs = [model.peft_config["default"] for model in (loaded, adapted)]
    assert len({(config.r, config.lora_alpha, str(config.rank_pattern)) for config in configs}) == 1
    assert torch.equal(outputs(loaded), outputs(adapted))


def test_an_adapter_of_other_signs_or_none_is_refused_and_unchanged(tmp_path):
    base = tiny_llama()
    signed_model(base, 8, trained=True, r=2, target_modules="all-linear").save_pretrained(tmp_path / "signed")
    plain = get_peft_model(copy.deepcopy(base), LoraConfig(r=16, target_modules="all-linear"))
    for parameter in trainable(plain):
        nn.init.normal_(parameter, std=0.3)
    plain.save_pretrained(tmp_path / "plain")
    for folder, blocks, error in [
        ("signed", 4, "has the signs of 8 blocks already"),
        ("plain", None, "no block signs"),
    ]:
        model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / folder, is_trainable=True)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises((ValueError, UnsupportedLayerError), match=error):
            add_block_signs(model, blocks)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@settings(max_examples=60, deadline=None)
@given(m=sides, n=sides, r=st.integers(1, 5), blocks=powers, dtype=st.sampled_from([torch.float64, torch.bfloat16]))
def test_the_blocks_of_ordinary_factors_are_found(m, n, r, blocks, dtype):
    signs = block_signs(m, n, blocks, dtype=dtype)
    parts = signs.shape[1]
    A, B = normal(r, n, seed=1).to(dtype), normal(m, r, seed=2).to(dtype)
    big_A, big_B = expanded_A(A, parts), expanded_B(B, signs)
    found = blocks_of(big_A, big_B)
    assert found
    assert all(torch.equal(block_signs(m, n, number, dtype=dtype), signs) for number in found)
    assert min(blocks, math.lcm(math.gcd(m, 32), parts)) in found
    assert not blocks_of(normal(r * parts, n).to(dtype), big_B)
    assert not blocks_of(big_A, normal(m, r * parts).to(dtype))
    assert not blocks_of(torch.zeros_like(big_A), big_B)


def test_another_adapter_is_not_loaded_into_signed_factors(tmp_path):
    base, lora = tiny_llama(), {"target_modules": "all-linear"}
    adapted = signed_model(base, 8, r=2, **lora)
    before = copy.deepcopy(adapted.state_dict())
    for r in (2, 16):  # of the factors' own shape, and of the ordinary ones'
        other = get_peft_model(copy.deepcopy(base), LoraConfig(r=r, **lora))
        nn.init.normal_(other.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
        other.save_pretrained(tmp_path / str(r))
        with pytest.raises(RuntimeError, match="not a factor with the signs of 8 blocks"):
            adapted.load_adapter(tmp_path / str(r), "default", is_trainable=True)
    signed_model(base, 4, trained=True, r=4, **lora).save_pretrained(tmp_path / "4")
    with pytest.raises(RuntimeError, match="not a factor with the signs of 8 blocks"):
        adapted.load_adapter(tmp_path / "4", "default", is_trainable=True)
    plain = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, **lora))
    with pytest.raises(RuntimeError, match="size mismatch"):
        plain.load_state_dict(adapted.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*q_proj.lora_A.default.weight"):
        adapted.load_state_dict({k: v for k, v in before.items() if "q_proj.lora_A" not in k})


def test_a_trainer_resumes_as_if_it_had_not_stopped(tmp_path):
    tokens = torch.randint(0, 64, (64, 8), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in tokens]

    def trainer(folder, **arguments):
        model = signed_model(tiny_llama(), 8, r=2, target_modules="all-linear", lora_dropout=0.1)
        settings = TrainingArguments(
            folder,
            max_steps=8,
            per_device_train_batch_size=4,
            report_to=[],
            save_steps=3,
            use_cpu=True,
            disable_tqdm=True,
            **arguments,
        )
        optimizer = (PairAdamW, {"model": model, "lr": 3e-3})
        return Trainer(model, settings, train_dataset=data, optimizer_cls_and_kwargs=optimizer)

    whole = trainer(tmp_path / "whole")
    whole.train()
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for one, other in zip(trainable(resumed.model), trainable(whole.model), strict=True):
        assert torch.equal(one, other)
    checkpoint = PeftModel.from_pretrained(tiny_llama(), tmp_path / "whole" / "checkpoint-8")
    torch.testing.assert_close(outputs(checkpoint), outputs(whole.model), rtol=1e-4, atol=1e-5)


def test_pefts_own_operations_take_it_for_the_ordinary_adapter_that_it_is():
    base = tiny_llama()
    adapted = signed_model(base, 8, trained=True, r=2, lora_alpha=4, target_modules="all-linear")
    expected = outputs(adapted)
    assert torch.equal(outputs(copy.deepcopy(adapted)), expected)
    with adapted.disable_adapter():
        assert torch.equal(outputs(adapted), outputs(base))
    adapted.merge_adapter()
    torch.testing.assert_close(outputs(adapted), expected, rtol=1e-4, atol=1e-5)
    adapted.unmerge_adapter()
    torch.testing.assert_close(outputs(adapted), expected, rtol=1e-4, atol=1e-5)
    adapted.add_weighted_adapter(["default"], [1.0], "sum", combination_type="cat")
    adapted.set_adapter("sum")
    torch.testing.assert_close(outputs(adapted), expected, rtol=1e-4, atol=1e-5)
    adapted.set_adapter("default")
    torch.testing.assert_close(outputs(adapted), expected, rtol=1e-4, atol=1e-5)
    tokens = torch.randint(0, 64, (2, 10))
    mixed = adapted(input_ids=tokens, adapter_names=["default", "__base__"]).logits
    torch.testing.assert_close(mixed[0], adapted(input_ids=tokens).logits[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[1], base(input_ids=tokens).logits[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs(adapted.merge_and_unload()), expected, rtol=1e-4, atol=1e-5)


WRITES = {
    "reset_lora_parameters": lambda layer, w: layer.reset_lora_parameters("default", True),
    "nn.init": lambda layer, w: nn.init.normal_(w),
    "in place": lambda layer, w: w.mul_(2),
    "in place, of data": lambda layer, w: w.data.mul_(2),
    "of detached": lambda layer, w: w.detach().copy_(w),
    "foreach": lambda layer, w: torch._foreach_mul_([w], 2.0),
    "data": lambda layer, w: setattr(w, "data", torch.zeros(8, 32)),
    "items": lambda layer, w: w.__setitem__(0, 1.0),
    "a row": lambda layer, w: w.data[0].zero_(),
    "columns": lambda layer, w: w[:, :1].mul_(2),
    "transposed": lambda layer, w: w.T.mul_(2),
    "in another shape": lambda layer, w: w.view(-1).mul_(2),
    "chunks": lambda layer, w: w.chunk(2)[1].zero_(),
    "a new parameter": lambda layer, w: setattr(layer.lora_A["default"], "weight", nn.Parameter(torch.zeros(8, 32))),
    "out": lambda layer, w: torch.mul(torch.ones(8, 32), 2, out=w),
    "swap_tensors": lambda layer, w: torch.utils.swap_tensors(w, torch.zeros(8, 32)),
}


@pytest.mark.parametrize("how", WRITES)
def test_what_would_write_to_the_ordinary_factors_is_told_so(how):
    adapted = signed_model(tiny_llama(), 4, trained=True, r=2, target_modules="all-linear")
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    weight = layer.lora_A["default"].weight
    assert weight.shape == (8, 32)
    expected = outputs(adapted)
    with torch.no_grad(), pytest.raises(MadeFactorError, match=r"change lora_A.NAME.factor"):
        WRITES[how](layer, weight)
    assert torch.equal(outputs(adapted), expected)
    copies = (weight @ weight.mT, weight.double(), weight.clone(), weight.sum(), copy.deepcopy(weight.detach()))
    assert {type(read) for read in copies} == {torch.Tensor}


def test_what_is_read_is_pickled_as_ordinary_tensors(tmp_path):
    adapted = signed_model(tiny_llama(), 4, trained=True, r=2, target_modules=["q_proj"])
    factors = [layer.weight.detach() for layer in adapted.modules() if isinstance(layer, SignedFactor)]
    torch.save(factors, tmp_path / "factors.pt")
    for one, other in zip(torch.load(tmp_path / "factors.pt", weights_only=True), factors, strict=True):
        assert type(one) is torch.Tensor
        assert torch.equal(one, other)


def test_a_dict_of_the_trained_parameters_is_loaded():
    base, lora = tiny_llama(), {"r": 2, "target_modules": "all-linear"}
    adapted, other = signed_model(base, 8, trained=True, **lora), signed_model(base, 8, **lora)
    trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert not other.load_state_dict(trained, strict=False).unexpected_keys
    assert torch.equal(outputs(other), outputs(adapted))
    name = next(iter(trained))
    with pytest.raises(RuntimeError, match=r"Unexpected key.*q_proj.lora_A.default.no_such"):
        other.load_state_dict(adapted.state_dict() | {name.replace("factor", "no_such"): torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"lora_A.default.factor' is \(4, 32\), but here it is \(2, 32\)"):
        other.load_state_dict({name: torch.zeros(4, 32)}, strict=False)


def test_a_model_without_memory_takes_the_tensors_of_a_state_dict():
    base, lora = tiny_llama(), {"r": 2, "target_modules": "all-linear"}
    adapted = signed_model(base, 8, trained=True, **lora)
    with torch.device("meta"):
        empty = signed_model(tiny_llama(), 8, **lora)
    for name, buffer in adapted.named_buffers():  # which no state dict holds
        empty.get_submodule(name.rpartition(".")[0]).register_buffer(name.rpartition(".")[2], buffer, persistent=False)
    empty.load_state_dict(adapted.state_dict(), assign=True)
    assert torch.equal(outputs(empty), outputs(adapted))


def test_signs_made_while_evaluating_can_be_trained_with():
    adapted = signed_model(tiny_llama(), 4, trained=True, r=2, target_modules="all-linear").double()
    tokens = torch.randint(0, 64, (2, 6))
    with torch.inference_mode():
        adapted(input_ids=tokens)
    adapted(input_ids=tokens, labels=tokens).loss.backward()
    assert all(parameter.grad is not None for parameter in trainable(adapted))


def test_hooks_on_the_factors_are_called():
    adapted = signed_model(tiny_llama(), 4, trained=True, r=2, target_modules=["q_proj"])
    tokens = torch.randint(0, 64, (2, 6))
    expected = adapted(input_ids=tokens).logits
    called = []
    for module in adapted.modules():
        if isinstance(module, SignedFactor):
            module.register_forward_hook(lambda module, args, output: called.append(output.shape[-1]))
    torch.testing.assert_close(adapted(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-5)
    assert called == [8, 32] * 2


TOKENS = torch.randint(0, 64, (8, 32), generator=torch.Generator().manual_seed(0))


def bytes_kept(model, tokens):
    """How many bytes a forward pass keeps for the backward pass, beside parameters and buffers."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=tokens, labels=tokens).loss
    del loss
    return sum(size for pointer, size in kept.items() if pointer not in own)


def test_no_more_is_kept_for_a_backward_pass_than_by_lora():
    base, lora = tiny_llama(), {"r": 2, "target_modules": "all-linear"}
    plain, signed = get_peft_model(copy.deepcopy(base), LoraConfig(**lora)), signed_model(base, 16, **lora)
    signs = sum(module._signs.nbytes for module in signed.modules() if isinstance(module, SignedB))
    assert bytes_kept(signed, TOKENS) - signs <= bytes_kept(plain, TOKENS)


def test_gradients_and_second_derivatives_are_those_of_the_definition():
    signs = block_signs(24, 16, 8, dtype=torch.float64)
    shapes = [(3, 24), (3, 16), (2, 16), (24, 2)]
    inputs = [normal(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]
    assert torch.autograd.gradcheck(lambda *given: add_signed_linear(*given, signs, 1.5), inputs)
    assert torch.autograd.gradgradcheck(lambda *given: add_signed_linear(*given, signs, 1.5), inputs)


@pytest.mark.parametrize("wide", ["result", "factors"])
def test_the_sum_and_each_gradient_have_the_dtypes_that_they_would_have_without_a_function_of_ours(wide):
    shapes = [(3, 24), (3, 16), (2, 16), (24, 2)]
    dtypes = (torch.float64, torch.float32) if wide == "result" else (torch.float32, torch.float64)
    result, *others = (normal(*shape, seed=seed) for seed, shape in enumerate(shapes))
    given = [result.to(dtypes[0]).requires_grad_(), *(tensor.to(dtypes[1]).requires_grad_() for tensor in others)]
    x, A, B = given[1:]
    signs = block_signs(24, 16, 8, dtype=dtypes[1])
    output = add_signed_linear(*given, signs, 1.5)
    wanted = given[0] + product_with_B(product_with_A(x, A, 8), B, signs) * 1.5
    assert output.dtype == torch.float64
    torch.testing.assert_close(output, wanted, rtol=1e-6, atol=1e-6)
    weights = normal(3, 24, seed=7)
    found, expected = (torch.autograd.grad((sum_ * weights).sum(), given) for sum_ in (output, wanted))
    assert [gradient.dtype for gradient in found] == [tensor.dtype for tensor in given]
    torch.testing.assert_close(list(found), list(expected), rtol=1e-5, atol=1e-5)


def test_a_dict_of_the_trained_parameters_is_saved_as_the_ordinary_adapter(tmp_path):
    base = tiny_llama()
    adapted = signed_model(base, 8, trained=True, r=2, target_modules="all-linear")
    trained = {name: parameter for name, parameter in adapted.named_parameters() if "lora_" in name}
    adapted.save_pretrained(tmp_path, state_dict=trained)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(outputs(loaded), outputs(adapted), rtol=1e-4, atol=1e-5)


def test_a_part_of_a_model_says_that_its_configuration_is_not_known():
    whole = get_peft_model(nn.Sequential(tiny_llama()), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.warns(UserWarning, match="call add_block_signs on the whole"):
        add_block_signs(whole.base_model.model[0], 4)


def test_of_two_models_with_injected_layers_both_are_saved_with_their_rank(tmp_path):
    both = nn.ModuleList([tiny_llama(), tiny_llama()])
    for model in both:
        model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    add_block_signs(both, 4)
    for number, model in enumerate(both):
        model.save_pretrained(tmp_path / str(number))
        assert PeftConfig.from_pretrained(tmp_path / str(number)).r == 8


def test_a_rank_is_written_for_the_layers_that_have_it_and_no_other(tmp_path):
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.ModuleDict({"out": nn.Linear(8, 8)})
            self.out = nn.Linear(8, 7)  # which can't be divided

        def forward(self, x):
            return self.out(self.block["out"](x))

    base = Nested()
    adapted = signed_model(base, 4, trained=True, r=2, alpha_pattern={"^out": 1}, target_modules=["out"])
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    x = torch.randn(5, 8)
    torch.testing.assert_close(loaded(x), adapted(x), rtol=1e-4, atol=1e-5)
    for name in ("out", "block.out"):
        scalings = {model.get_submodule(f"base_model.model.{name}").scaling["default"] for model in (adapted, loaded)}
        assert len(scalings) == 1


def test_a_trainer_that_makes_new_models_gives_each_the_signs(tmp_path):
    tokens = torch.randint(0, 64, (8, 8))
    data = [{"input_ids": row, "labels": row} for row in tokens]

    def new_model():
        return get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))

    settings = TrainingArguments(tmp_path, max_steps=1, report_to=[], save_strategy="no", use_cpu=True)
    trainer = Trainer(args=settings, model_init=new_model, train_dataset=data, callbacks=[BlockSignsCallback(4)])
    trainer.train()
    layer = trainer.model.base_model.model.model.layers[0].self_attn.q_proj
    assert isinstance(layer.lora_A["default"], SignedFactor)
    late = Trainer(new_model(), settings, train_dataset=data)
    late.add_callback(BlockSignsCallback())
    with pytest.raises(RuntimeError, match="give it to the Trainer's constructor"):
        late.train()


def test_an_adapter_is_not_hot_swapped_into_signed_factors(tmp_path):
    base = tiny_llama()
    config = LoraConfig(r=8, lora_alpha=8, target_modules="all-linear")
    get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path)
    adapted = signed_model(base, 4, trained=True, r=2, lora_alpha=2, target_modules="all-linear")
    expected = outputs(adapted)
    with pytest.raises(MadeFactorError, match="can't be written to"):
        hotswap_adapter(adapted, tmp_path, "default")
    assert torch.equal(outputs(adapted), expected)


def test_transformers_own_adapters_are_ordinary_when_saved(tmp_path):
    base = tiny_llama()
    model = copy.deepcopy(base)
    model.add_adapter(LoraConfig(r=2, target_modules="all-linear"))
    add_block_signs(model, 8)
    for parameter in trainable(model):
        nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert loaded.peft_config["default"].r == 16
    torch.testing.assert_close(outputs(loaded), outputs(model), rtol=1e-4, atol=1e-5)


def test_a_model_with_injected_layers_alone_trains_too():
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["first"]), TwoLayers())
    add_block_signs(model, 4)
    assert model.first.r["default"] == 8


def test_autocast_and_dropout_are_loras():
    adapted = signed_model(nn.Sequential(nn.Linear(8, 16)), trained=True, r=2, lora_dropout=0.5, target_modules=["0"])
    x = torch.randn(6, 8)
    adapted.eval()
    exact = adapted(x)
    assert torch.equal(adapted(x), exact)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = adapted(x)
        of_peft = type(adapted.base_model.model[0]).__bases__[1].forward(adapted.base_model.model[0], x)
    assert rounded.dtype == of_peft.dtype == torch.bfloat16
    assert 0 < (rounded - exact).norm() < 0.02 * exact.norm()
    assert (rounded - of_peft).norm() < 0.02 * exact.norm()
    adapted.train()
    assert not torch.allclose(adapted(x), exact)


@pytest.mark.parametrize("convert", [torch.nn.Module.double, torch.nn.Module.bfloat16])
def test_conversions_of_the_model_take_the_signs_along(convert):
    adapted = signed_model(nn.Sequential(nn.Linear(8, 16)), trained=True, r=2, target_modules=["0"])
    before = adapted(torch.ones(1, 8))
    convert(adapted)
    dtype = trainable(adapted)[0].dtype
    torch.testing.assert_close(adapted(torch.ones(1, 8, dtype=dtype)).float(), before, rtol=0.05, atol=0.05)
    assert adapted.base_model.model[0].lora_B["default"].weight.dtype == dtype


@pytest.mark.usefixtures("without_shape_checks")  # torch.compile cannot trace them
def test_a_compiled_model_computes_the_same():
    adapted = signed_model(nn.Sequential(nn.Linear(8, 16)), trained=True, r=2, target_modules=["0"])
    x = torch.randn(6, 8)
    compiled = torch.compile(adapted, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), adapted(x), rtol=1e-5, atol=1e-6)


def test_a_second_call_changes_nothing():
    adapted = signed_model(TwoLayers(), 4, trained=True, r=2, target_modules=["first", "second"])
    expected, ranks = adapted(torch.ones(1, 12)), adapted.peft_config["default"].to_dict()
    add_block_signs(adapted, 4)
    assert torch.equal(adapted(torch.ones(1, 12)), expected)
    assert adapted.peft_config["default"].to_dict() == ranks
    with pytest.raises(UnsupportedLayerError, match=r"first.*4 blocks already: set blocks=4"):
        add_block_signs(adapted, 2)


@pytest.mark.parametrize(("r", "blocks"), [(1, 256), (8, 32), (12, 16), (100, 2), (300, 2)])
def test_by_default_the_updates_rank_is_256_or_next_to_it(r, blocks):
    adapted = get_peft_model(nn.Sequential(nn.Linear(512, 512)), LoraConfig(r=r, target_modules=["0"]))
    add_block_signs(adapted)
    layer = adapted.base_model.model[0]
    assert layer.lora_B["default"].blocks == blocks
    assert layer.r["default"] == r * blocks


@pytest.mark.parametrize("blocks", [0, 1, 3, -4, 12, 4.0, True, "4"])
def test_other_numbers_than_powers_of_two_are_refused(blocks):
    with pytest.raises(ValueError, match="power of two above 1, got"):
        add_block_signs(get_peft_model(TwoLayers(), LoraConfig(target_modules=["first"])), blocks)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"use_dora": True}, UnsupportedLayerError, "first.*use_dora"),
        ({"lora_bias": True}, UnsupportedLayerError, "first.*lora_bias"),
        ({"init_lora_weights": False}, ValueError, "first.*not zero"),
        ({"init_lora_weights": "pissa"}, ValueError, "first.*not zero"),
    ],
)
def test_what_cannot_have_signs_is_refused_and_unchanged(settings, error, message):
    model = get_peft_model(TwoLayers(), LoraConfig(r=2, target_modules=["first"], **settings))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        add_block_signs(model, 4)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert model.peft_config["default"].r == 2


def test_the_command_refuses_what_the_method_cannot_be():
    with pytest.raises(ValueError, match="init_lora_weights='gaussian': the update of LoRA with block signs"):
        BlockSigns().peft_config({"init_lora_weights": "gaussian"})
    with pytest.raises(ValueError, match="blocks must be a power of two above 1, got 24"):
        BlockSigns(blocks=24)
    assert BlockSigns.ordinary_adapter


def test_a_model_without_such_layers_is_refused():
    with pytest.raises(ValueError, match="no linear layer"):
        add_block_signs(get_peft_model(Mixed(), LoraConfig(r=2, target_modules=["embed"])), 4)
    with pytest.raises(UnsupportedLayerError, match="no LoRA layers"):
        add_block_signs(TwoLayers(), 4)


def test_rescales_and_signs_refuse_each_other():
    signed = signed_model(TwoLayers(), 4, r=2, target_modules=["first", "second"])
    with pytest.raises(UnsupportedLayerError, match=r"first.*block signs"):
        ScaLora(signed, torch.optim.AdamW(trainable(signed)), ScaLoraConfig())
    with pytest.raises(UnsupportedLayerError, match=r"first.*block signs"):
        find_lora_pairs(signed)
    model = get_peft_model(TwoLayers(), LoraConfig(r=2, target_modules=["first", "second"]))
    ScaLora(model, torch.optim.AdamW(trainable(model)), ScaLoraConfig())
    with pytest.raises(UnsupportedLayerError, match=r"first.*rescales"):
        add_block_signs(model, 4)


@pytest.fixture
def processes(request):
    """A process group: of this process alone, or one in which the other process is not there."""
    kind, store, count = request.param
    torch.distributed.init_process_group(kind, store=store(), rank=0, world_size=count)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("processes", [("gloo", torch.distributed.HashStore, 1)], indirect=True)
@pytest.mark.usefixtures("processes")
def test_distributed_data_parallel_takes_two_passes_before_a_backward_pass():
    adapted = signed_model(nn.Sequential(nn.Linear(8, 16)), trained=True, r=2, target_modules=["0"])
    wrapped = DistributedDataParallel(adapted)
    (wrapped(torch.ones(2, 8)) - wrapped(torch.zeros(2, 8))).sum().backward()
    assert all(parameter.grad.norm() > 0 for parameter in trainable(adapted))
    assert not list(adapted.buffers()), "nothing to send around"


def split_by_fsdp1(model):
    FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


@pytest.mark.parametrize("processes", [("fake", FakeStore, 2)], indirect=True)
@pytest.mark.usefixtures("processes")
def test_factors_that_are_no_parameters_any_more_are_refused_before_a_step():
    adapted = signed_model(nn.Sequential(nn.Linear(8, 16)), r=2, target_modules=["0"])
    with pytest.raises(UnsupportedLayerError, match="block signs are no parameters any more, as FSDP1"):
        split_by_fsdp1(adapted)


@pytest.mark.parametrize("bits", [{"load_in_4bit": True}, {"load_in_8bit": True}])
def test_a_quantised_base_is_trained_and_the_adapter_is_ordinary(tmp_path, bits):
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")

    def base():
        settings = BitsAndBytesConfig(**bits)
        return LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=settings, dtype="float32")

    adapted, plain = (get_peft_model(base(), LoraConfig(r=2, lora_alpha=4, target_modules="all-linear")) for _ in "ab")
    add_block_signs(adapted, 8)
    signs = sum(module._signs.nbytes for module in adapted.modules() if isinstance(module, SignedB))
    assert bytes_kept(adapted, TOKENS) - signs <= bytes_kept(plain, TOKENS)
    optimizer, tokens = PairAdamW(adapted, lr=5e-3), torch.randint(0, 64, (4, 12))
    losses = losses_of(adapted, optimizer, tokens, 4)
    assert losses[-1] < losses[0] - 0.05
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "adapter")
    assert loaded.peft_config["default"].r == 16
    torch.testing.assert_close(outputs(loaded), outputs(adapted), rtol=1e-3, atol=1e-4)


def of_trl(kind, settings_class, base, folder, data, model=None, **arguments):
    settings = settings_class(
        str(folder), max_steps=6, per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True,
        learning_rate=1e-2, save_steps=3, bf16=False, **arguments,
    )  # fmt: skip
    model = {
        "model": AutoModelForCausalLM.from_pretrained(base),
        "peft_config": LoraConfig(r=2, target_modules="all-linear"),
        "callbacks": [BlockSignsCallback(8)],
    } | ({"model": model, "peft_config": None, "callbacks": []} if model else {})
    dataset, tokenizer = Dataset.from_list(data), AutoTokenizer.from_pretrained(base)
    return kind(args=settings, train_dataset=dataset, processing_class=tokenizer, **model)


@pytest.mark.slow
def test_sft_trainer_with_its_own_peft_config(causal_folder, tmp_path):
    data = [{"text": text} for text in ["say: red blue", "say: green"] * 12]
    trainer = of_trl(SFTTrainer, SFTConfig, causal_folder, tmp_path / "run", data)
    trainer.train()
    assert trainer.state.global_step == 6
    trainer.save_model(tmp_path / "final")
    expected = trained_outputs(trainer.model)
    for folder in (tmp_path / "final", tmp_path / "run" / "checkpoint-6"):
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(causal_folder), folder)
        assert loaded.peft_config["default"].r == 16
        torch.testing.assert_close(trained_outputs(loaded), expected, rtol=1e-4, atol=1e-5)
    resumed = of_trl(SFTTrainer, SFTConfig, causal_folder, tmp_path / "run", data)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert torch.equal(trained_outputs(resumed.model), expected)


@pytest.mark.slow
def test_dpo_has_the_untouched_model_as_its_reference(causal_folder, tmp_path):
    data = [{"prompt": "say: red", "chosen": " red", "rejected": " blue"}] * 24
    trainer = of_trl(DPOTrainer, DPOConfig, causal_folder, tmp_path, data)
    trainer.train()
    untouched = AutoModelForCausalLM.from_pretrained(causal_folder)
    with trainer.model.disable_adapter():
        assert torch.equal(trained_outputs(trainer.model), trained_outputs(untouched))
    assert not torch.equal(trained_outputs(trainer.model), trained_outputs(untouched))


@pytest.mark.slow
def test_dpo_of_a_model_with_trained_signs_has_that_as_its_reference(causal_folder, tmp_path):
    data = [{"prompt": "say: red", "chosen": " red", "rejected": " blue"}] * 24
    model = signed_model(
        AutoModelForCausalLM.from_pretrained(causal_folder), 8, trained=True, target_modules=["q_proj"]
    )
    before = trained_outputs(model)
    trainer = of_trl(DPOTrainer, DPOConfig, causal_folder, tmp_path, data, model=model)
    trainer.train()
    assert not torch.allclose(trained_outputs(model), before)
    model.set_adapter("ref")
    torch.testing.assert_close(trained_outputs(model), before)
    model.save_pretrained(tmp_path / "both")
    reference = AutoModelForCausalLM.from_pretrained(causal_folder)
    ordinary = PeftModel.from_pretrained(reference, tmp_path / "both" / "ref")
    torch.testing.assert_close(trained_outputs(ordinary), before, rtol=1e-4, atol=1e-5)


def trained_outputs(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[5, 9, 12, 20]])).logits
