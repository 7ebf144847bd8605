"""Optimizer transport: a run scaled at step k equals one whose adapter was scaled from the start."""

import pytest
import torch
from lion_pytorch import Lion
from models import TwoLayers, trainable, with_lora

from scalora import UnsupportedOptimizerError, register_optimizer
from scalora.transport import scale_gradient_and_state, state_degrees

OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.1}),
    "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "foreach": True}),
    "adam": (torch.optim.Adam, {}),
    "adam foreach": (torch.optim.Adam, {"foreach": True}),
    "adam amsgrad": (torch.optim.Adam, {"amsgrad": True}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "adamw fused": (torch.optim.AdamW, {"fused": True}),
    "adamw amsgrad foreach": (torch.optim.AdamW, {"amsgrad": True, "foreach": True}),
    "nadam": (torch.optim.NAdam, {}),
    "radam": (torch.optim.RAdam, {}),
    "rmsprop": (torch.optim.RMSprop, {}),
    "rmsprop centered": (torch.optim.RMSprop, {"centered": True}),
    "rmsprop momentum": (torch.optim.RMSprop, {"momentum": 0.9, "eps": 0.0}),
    "adagrad": (torch.optim.Adagrad, {}),
    "lion": (Lion, {"weight_decay": 0.1}),
}
ALPHA = torch.tensor([0.5, 1.7, 3.0], dtype=torch.float64)
BETA = torch.tensor([2.5, 0.3, 1.1], dtype=torch.float64)


def layer_of(model):
    return model.base_model.model.first


@torch.no_grad()
def scale_adapter(model):
    """Scale the factors by constants and keep the function, written out densely."""
    layer = layer_of(model)
    A, B = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    s = layer.scaling["default"]
    before = s * A @ B
    A.mul_(ALPHA)
    B.mul_(BETA[:, None])
    layer.base_layer.weight.add_(before - s * A @ B)
    return A, B


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_scaled_at_step_k_equals_scaled_from_the_start(name):
    cls, settings = OPTIMIZERS[name]
    k, steps, rate = 6, 25, 1e-2
    torch.manual_seed(1)
    batches = [(torch.randn(8, 12).double(), torch.randn(8, 6).double()) for _ in range(steps)]
    trajectories = []
    for from_the_start in (True, False):
        model = with_lora(TwoLayers(), dtype=torch.float64, r=3, target_modules=["first"])
        if from_the_start:
            scale_adapter(model)
        optimizer = cls(trainable(model), lr=rate, **settings)
        trajectory = []
        for t, (x, y) in enumerate(batches):
            # The moments fill while the weights stand still: so both runs see the same gradients G until step k.
            optimizer.param_groups[0]["lr"] = rate if t >= k else 1e-300
            torch.nn.functional.mse_loss(model(x), y).backward()
            if t == k and not from_the_start:
                A, B = scale_adapter(model)
                degrees = state_degrees(optimizer)
                scale_gradient_and_state(optimizer, degrees, A, BETA)
                scale_gradient_and_state(optimizer, degrees, B, ALPHA[:, None])
            optimizer.step()
            optimizer.zero_grad()
            layer = layer_of(model)
            if t >= k:
                trajectory.append((layer.lora_A["default"].weight.clone(), layer.lora_B["default"].weight.clone()))
        trajectories.append(trajectory)
    assert not torch.equal(trajectories[0][0][0], trajectories[0][-1][0])
    for expected, actual in zip(*trajectories, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def parameter():
    return torch.nn.Parameter(torch.randn(4, 3))


@pytest.mark.parametrize(
    ("optimizer", "reason"),
    [
        (lambda p: torch.optim.Adafactor([p]), "Adafactor.*factored"),
        (lambda p: torch.optim.Muon([p]), "Muon.*orthogonalises"),
        (lambda p: torch.optim.LBFGS([p]), "LBFGS"),
        (lambda p: torch.optim.Adamax([p]), "Adamax"),
        (lambda p: type("Mine", (torch.optim.AdamW,), {})([p]), "Mine.*register_optimizer"),
        (lambda p: torch.optim.Adam([p], weight_decay=0.1), "weight_decay=0.1"),
        (lambda p: torch.optim.SGD([p], weight_decay=0.1), "weight_decay=0.1"),
        (lambda p: torch.optim.Adagrad([p], initial_accumulator_value=0.5), "initial_accumulator_value"),
    ],
)
def test_what_cannot_be_carried_is_refused_by_name(optimizer, reason):
    with pytest.raises(UnsupportedOptimizerError, match=reason) as error:
        state_degrees(optimizer(parameter()))
    assert "AdamW" in str(error.value)
    assert "\n" not in str(error.value)


class Signum(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            state["momentum"] = 0.9 * state.get("momentum", 0) + p.grad
            p.sub_(state["momentum"].sign(), alpha=self.param_groups[0]["lr"])


def test_a_user_can_teach_it_an_optimizer():
    p = parameter()
    optimizer = Signum([p])
    with pytest.raises(UnsupportedOptimizerError, match="Signum"):
        state_degrees(optimizer)
    register_optimizer(Signum, {"momentum": 1})
    p.grad = torch.ones_like(p)
    optimizer.step()
    scale_gradient_and_state(optimizer, state_degrees(optimizer), p, torch.tensor([1.0, 2.0, 3.0]))
    assert optimizer.state[p]["momentum"][0].tolist() == [1.0, 2.0, 3.0]
    register_optimizer(Signum, {"other": 1})
    with pytest.raises(UnsupportedOptimizerError, match="'momentum'"):
        scale_gradient_and_state(optimizer, state_degrees(optimizer), p, torch.tensor([1.0, 2.0, 3.0]))
    with pytest.raises(ValueError, match="degree"):
        register_optimizer(Signum, {"momentum": -1})
