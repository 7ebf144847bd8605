"""A base is told from another one by its weights, in whatever form a layer keeps them."""

import copy

import pytest
import torch
from models import TwoLayers, tiny_llama, trainable, with_lora
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from scalora import ScaLora
from scalora.saving.fingerprint import base_fingerprint, difference

# Of version 1 of the format, for the model of the test below.
FLOAT = "9bd78fb0ffce4f72e3a23da5aa2cd088061eaa489531b3f38853ad99e32c53e1"


class Packed(nn.Module):
    """Weights in buffers, as GPTQ's and AWQ's layers keep them, and one in a float8 parameter."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Linear(8, 8)
        self.register_buffer("qweight", torch.randint(-(2**31), 2**31 - 1, (16, 8), generator=generator).int())
        self.register_buffer("scales", torch.rand(4, 8, generator=generator).half())
        self.register_buffer("not_saved", torch.zeros(3), persistent=False)
        eighth = torch.randn(8, 8, generator=generator).to(torch.float8_e4m3fn)
        self.eighth = nn.Parameter(eighth, requires_grad=False)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x):
        return self.norm(self.first(x))


def adapted(model, **settings):
    return with_lora(model, r=2, **{"target_modules": ["first"]} | settings)


@pytest.mark.parametrize("held_in", ["qweight", "scales", "eighth", "first.base_layer.weight", "norm.weight"])
def test_bases_with_other_weights_have_other_fingerprints(held_in):
    torch.manual_seed(0)
    model = adapted(Packed())
    other = copy.deepcopy(model)
    assert base_fingerprint(model) == base_fingerprint(other)
    tensor = other.base_model.model.get_submodule(held_in.rpartition(".")[0])
    tensor = getattr(tensor, held_in.rpartition(".")[2])
    with torch.no_grad():
        tensor.copy_(tensor.flip(0))
    if held_in == "norm.weight":
        with torch.no_grad():
            tensor.mul_(2)
    assert base_fingerprint(model) != base_fingerprint(other)


def test_what_training_changes_is_no_part_of_the_base():
    torch.manual_seed(0)
    model = adapted(Packed(), modules_to_save=["norm"])
    before = base_fingerprint(model)
    optimizer = torch.optim.SGD(trainable(model), lr=1.0)
    for _ in range(3):
        model(torch.randn(6, 8)).square().sum().backward()
        optimizer.step()
    model.base_model.model.not_saved.fill_(1)
    assert base_fingerprint(model) == before
    # A new head differs with every load.
    torch.manual_seed(1)
    nn.init.normal_(model.base_model.model.norm.original_module.weight)
    assert base_fingerprint(model) == before


def test_the_fingerprint_of_a_float_model_is_what_it_has_always_been():
    model = with_lora(TwoLayers(), r=2, target_modules=["first", "second"])
    for i, p in enumerate(model.parameters()):
        p.data = torch.arange(p.numel(), dtype=p.dtype).view(p.shape) + i
    assert base_fingerprint(model) == FLOAT


class Wrapper(torch.Tensor):
    """A tensor made of tensors, as torchao's quantised weights are, that can do nothing else than to be detached."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(function)


def test_a_weight_that_is_made_of_tensors_counts_by_its_parts():
    codes, scale = torch.arange(64, dtype=torch.int8).view(8, 8), torch.ones(8)

    def fingerprint(codes, scale):
        torch.manual_seed(0)
        model = adapted(Packed())
        model.base_model.model.eighth = nn.Parameter(Wrapper(codes, scale), requires_grad=False)
        return base_fingerprint(model)

    assert fingerprint(codes, scale) == fingerprint(codes.clone(), scale.clone())
    assert len({fingerprint(codes, scale), fingerprint(codes + 1, scale), fingerprint(codes, 2 * scale)}) == 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(hidden_size=64, intermediate_size=64).save_pretrained(folder / "base")
    doubled = tiny_llama(hidden_size=64, intermediate_size=64)
    for name, p in doubled.named_parameters():
        if "proj" in name:
            p.data *= 2
    doubled.save_pretrained(folder / "doubled")
    return folder


@pytest.mark.parametrize(
    "quantisation",
    [
        {"load_in_8bit": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    ],
    ids=["int8", "nf4", "nf4-double"],
)
def test_quantised_bases_of_equal_codes_and_other_scales_are_told_apart(quantisation, folder):
    def load(name):
        base = LlamaForCausalLM.from_pretrained(
            folder / name, quantization_config=BitsAndBytesConfig(**quantisation), dtype="float32"
        )
        return with_lora(base, r=2, target_modules=["q_proj"], random_B=False)

    model = load("base")
    before = base_fingerprint(model)
    assert before == base_fingerprint(load("base"))
    codes = {name: p for name, p in load("doubled").named_parameters() if "q_proj.base_layer" in name}
    assert codes
    assert all(torch.equal(p, dict(model.named_parameters())[name]) for name, p in codes.items())
    assert difference(before, base_fingerprint(load("doubled"))) is not None
    with torch.no_grad():
        model.eval()(input_ids=torch.arange(8)[None])
    assert difference(before, base_fingerprint(model)) is None
    # Earlier versions saved the first hash alone.
    assert difference(before.split("-")[0], before) is None


def test_what_is_put_around_layers_is_not_in_the_names():
    model, wrapped = (with_lora(tiny_llama(), r=2, target_modules=["q_proj", "down_proj"]) for _ in range(2))
    layers = wrapped.base_model.model.model.layers
    layers[0] = checkpoint_wrapper(layers[0])
    layers[1].mlp = torch.compile(layers[1].mlp, backend="eager")
    layers[1].self_attn.q_proj = checkpoint_wrapper(layers[1].self_attn.q_proj)
    assert base_fingerprint(wrapped) == base_fingerprint(model)
    engines = [ScaLora(m, torch.optim.AdamW(trainable(m), lr=1e-3)) for m in (model, wrapped)]
    plain, other = (engine.state_dict() for engine in engines)
    assert other["tensors"].keys() == plain["tensors"].keys()
    assert [pair.name for pair in engines[1].pairs] == [pair.name for pair in engines[0].pairs]
    engines[1].load_state_dict(plain)
