"""Convolutions with LoRA: linear maps of patches, which rescales take for matrices.

The truth is the same model with linear layers on patches that are cut out, and ordinary LoRA, on the same inputs.
"""

import copy

import pytest
import torch
from models import trainable, with_adapter_in_float32
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.functional import unfold
from transformers import PreTrainedConfig, PreTrainedModel

from scalora import PairAdamW, ScaLora, ScaLoraConfig, UnsupportedLayerError, export_adapter, export_merged, load_model
from scalora.start import optimal_start, random_start

LAYERS = {
    "first": lambda: nn.Conv2d(3, 8, 3, stride=2, padding=1),
    "second": lambda: nn.Conv2d(8, 6, (1, 2), bias=False),
    "pointwise": lambda: nn.Conv2d(6, 6, 1),
    "line": lambda: nn.Conv1d(6, 5, 3, padding=1),
    "point": lambda: nn.Conv1d(5, 5, 1),
    "cube": lambda: nn.Conv3d(5, 4, 1),
    "cubes": lambda: nn.Conv3d(4, 4, (1, 3, 1), padding=(0, 1, 0)),
}
STEPS = 5


class NetConfig(PreTrainedConfig):
    model_type = "test_convolutions"


class Net(PreTrainedModel):
    config_class = NetConfig

    def __init__(self, config):
        super().__init__(config)
        torch.manual_seed(0)
        for name, layer in LAYERS.items():
            setattr(self, name, layer())
        self.head = nn.Linear(4, 3)
        self.post_init()

    def _init_weights(self, module):
        """The layers have been initialised."""

    def forward(self, pixels):
        x = torch.tanh(self.pointwise(torch.tanh(self.second(torch.tanh(self.first(pixels))))))
        x = torch.tanh(self.point(torch.tanh(self.line(x.flatten(2)))))
        x = torch.tanh(self.cubes(torch.tanh(self.cube(x[..., None, None]))))
        return self.head(x.flatten(2).mean(-1))


class OfPatches(nn.Linear):
    """A convolution of two dimensions or fewer as a linear layer on patches."""

    def __init__(self, convolution):
        super().__init__(convolution.weight[0].numel(), convolution.out_channels, bias=convolution.bias is not None)
        self.weight.data = convolution.weight.detach().flatten(1).clone()
        if self.bias is not None:
            self.bias.data = convolution.bias.detach().clone()


def patches_of(x, convolution):
    """(batch, positions, entries of a patch), and the spatial shape of the output. Three dimensions: the middle one."""
    kernel, stride, padding = convolution.kernel_size, convolution.stride, convolution.padding
    if len(kernel) == 1:
        x, kernel, stride, padding = x[..., None, :], (1, *kernel), (1, *stride), (0, *padding)
    if len(kernel) == 3:
        x, kernel, stride, padding = x[..., 0], kernel[:2], stride[:2], padding[:2]
    return unfold(x, kernel, padding=padding, stride=stride).mT


class NetOfPatches(nn.Module):
    """`Net`, with linear layers."""

    def __init__(self, net):
        super().__init__()
        self.shapes = {name: layer() for name, layer in LAYERS.items()}  # not registered
        for name in LAYERS:
            setattr(self, name, OfPatches(getattr(net, name)))
        self.head = copy.deepcopy(net.head)

    def apply_to(self, name, x):
        with torch.no_grad():
            shape = self.shapes[name].to(x)(x).shape
        return getattr(self, name)(patches_of(x, self.shapes[name])).mT.reshape(shape)

    def forward(self, pixels):
        x = pixels
        for name in ("first", "second", "pointwise"):
            x = torch.tanh(self.apply_to(name, x))
        x = x.flatten(2)
        for name in ("line", "point"):
            x = torch.tanh(self.apply_to(name, x))
        x = x[..., None, None]
        for name in ("cube", "cubes"):
            x = torch.tanh(self.apply_to(name, x))
        return self.head(x.flatten(2).mean(-1))


ADAPTER = {"r": 2, "lora_alpha": 4, "target_modules": [*LAYERS, "head"]}


def base():
    return Net(NetConfig())


def adapted(dtype=torch.float64, random_B=True, **settings):
    torch.manual_seed(1)
    model = get_peft_model(base(), LoraConfig(**ADAPTER | settings)).to(dtype)
    if random_B:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.3)
    return model


def of_patches(like, **settings):
    model = get_peft_model(NetOfPatches(base()), LoraConfig(**ADAPTER | settings)).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(like.get_parameter(name).reshape(parameter.shape))
    return model


def data(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, 8, 8, generator=generator), torch.randn(4, 3, generator=generator)


def train(model, optimizer, steps=STEPS):
    losses = []
    for step in range(steps):
        pixels, wanted = data(step)
        dtype = next(model.parameters()).dtype
        loss = (model(pixels.to(dtype)) - wanted.to(dtype)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def says(model):
    return model.eval()(data(99)[0].to(next(model.parameters()).dtype))


def close(found, wanted, tolerance):
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


OPTIMIZERS = {
    "adamw": lambda model: torch.optim.AdamW(trainable(model), lr=1e-2),
    "sgd": lambda model: torch.optim.SGD(trainable(model), lr=1e-2, momentum=0.9),
    "pairs": lambda model: PairAdamW(model, lr=2e-3),
}

CASES = {
    "auto": {},
    "matrix, sgd": {"mode": "matrix", "optimizer": "sgd", "target_norm": 1.0},
    "matrix, pairs": {"mode": "matrix", "optimizer": "pairs"},
    "factored": {"merge": "factored", "remainder_rank": 12},
    "with a bias": {"merge": "factored", "remainder_rank": 12, "lora_bias": True},
}


def attached(model, optimizer="adamw", **config):
    optimizer = OPTIMIZERS[optimizer](model)
    return ScaLora(model, optimizer, ScaLoraConfig(**{"warmup_steps": 0, "merge": "dense"} | config)), optimizer


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_convolutions_train_as_linear_layers_on_patches_do(case):
    config = dict(CASES[case])
    settings = {"lora_bias": True} if config.pop("lora_bias", False) else {}
    model = adapted(**settings)
    other = of_patches(model, **settings)
    engine, optimizer = attached(model, **config)
    engine_of_other, optimizer_of_other = attached(other, **config)
    assert train(model, optimizer) == pytest.approx(train(other, optimizer_of_other), rel=1e-10)
    for name, parameter in other.named_parameters():
        close(model.get_parameter(name).reshape(parameter.shape), parameter, 1e-10)
    found, wanted = engine.metrics(), engine_of_other.metrics()
    assert found == pytest.approx(wanted, rel=1e-6, abs=1e-9)
    assert wanted["scalora/merge_norm"] > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("merge", ["dense", "factored"])
def test_a_run_with_convolutions_is_saved_loaded_exported_and_merged(merge, tmp_path):
    model = adapted(torch.float32)
    engine, optimizer = attached(model, merge=merge, remainder_rank=4)
    train(model, optimizer)
    wanted, before = says(model), says(base())
    assert (wanted - before).norm() > 0.05 * before.norm()
    engine.save(tmp_path / "state")
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(says(load_model(base(), tmp_path / "saved")), wanted)
    export_adapter(base(), tmp_path / "state", tmp_path / "adapter", rtol=1e-6)
    close(says(PeftModel.from_pretrained(base(), tmp_path / "adapter")), wanted, 1e-5)
    close(says(export_merged(base(), tmp_path / "state", tmp_path / "merged")), wanted, 1e-5)
    whole = copy.deepcopy(model)
    whole.merge_adapter()
    close(says(whole), wanted, 1e-5)
    whole.unmerge_adapter()
    assert torch.equal(says(whole), wanted)
    close(says(whole.merge_and_unload()), wanted, 1e-5)
    if merge == "factored":
        again = adapted(torch.float32)
        attached(again, merge=merge, remainder_rank=4)
        again.load_state_dict({key: v for key, v in model.state_dict().items() if "lora_" in key}, strict=False)
        close(says(again), wanted, 1e-5)
        with model.disable_adapter():
            close(says(model), before, 1e-6)


@pytest.mark.parametrize("merge", ["dense", "dense_8bit", "stochastic"])
def test_bfloat16_convolutions_take_merges(merge):
    model = with_adapter_in_float32(adapted(torch.bfloat16))
    engine, _ = attached(model, merge=merge)
    exact = {}
    for pair in engine.pairs:
        product = pair.lora_B.detach().flatten(1) @ pair.lora_A.detach().flatten(1)
        exact[pair.name] = pair.weight.float() + pair.scaling * product.reshape(pair.weight.shape)
    for parameter in trainable(model):
        parameter.grad = torch.randn(parameter.shape)
    engine._before_step(engine.optimizer, (), {})
    moved = 0.0
    for pair in engine.pairs:
        product = pair.lora_B.detach().flatten(1) @ pair.lora_A.detach().flatten(1)
        weight = pair.remainder.exact(pair.weight).float()
        found = weight + pair.scaling * product.reshape(pair.weight.shape)
        # One rounding to bfloat16 at most, and none with its errors kept.
        error = (found - exact[pair.name]).norm() / exact[pair.name].norm()
        assert error < {"dense": 1e-6, "dense_8bit": 1e-4, "stochastic": 1e-2}[merge]
        moved += pair.remainder.changed
    assert moved == len(engine.pairs)


@pytest.mark.parametrize("start", ["optimal", "random"])
def test_starts_of_convolutions_keep_the_function(start):
    model = adapted(random_B=False, target_modules=["first", "line"])
    before = says(model)
    pixels, wanted = data(0)
    if start == "random":
        random_start(model, target_norm=0.7)
    else:
        optimal_start(model, lambda: (model(pixels.double()) - wanted).square().mean().backward(), target_norm=0.7)
    close(says(model), before, 1e-10)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            close(parameter.flatten(1).norm(dim=0), torch.full((2,), 0.7, dtype=torch.float64), 1e-10)


REFUSED = {
    "groups=2": nn.Conv2d(4, 4, 3, groups=2),
    "dilation=": nn.Conv2d(4, 4, 3, dilation=2),
    "padding_mode='circular'": nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
    "not contiguous": nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last),
    "MultiheadAttention": nn.MultiheadAttention(4, 2),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_no_matrix_of_patches_is_refused_by_name(reason):
    model = nn.Sequential(nn.Identity(), copy.deepcopy(REFUSED[reason]))
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["1"]))
    with pytest.raises(UnsupportedLayerError, match=rf"base_model.model.1.*{reason}"):
        ScaLora(model, torch.optim.AdamW(trainable(model)))
