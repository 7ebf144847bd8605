"""Optimizer transport: a run scaled at step k equals one whose adapter was scaled from the start."""

import pytest
import torch
from lion_pytorch import Lion
from models import TwoLayers, trainable, with_lora
from optimi import StableAdamW
from schedulefree import AdamWScheduleFree, RAdamScheduleFree, SGDScheduleFree

from scalora import ScaLora, ScaLoraConfig, UnsupportedOptimizerError, register_optimizer
from scalora.rescale.optimizers import state_kinds
from scalora.rescale.transport import scale_gradients_and_states

OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.1}),
    "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "foreach": True}),
    "sgd fused": (torch.optim.SGD, {"momentum": 0.9, "fused": True}),
    "adam": (torch.optim.Adam, {}),
    "adam fused": (torch.optim.Adam, {"fused": True, "amsgrad": True}),
    "adam decoupled": (torch.optim.Adam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    "adam foreach": (torch.optim.Adam, {"foreach": True}),
    "adam amsgrad": (torch.optim.Adam, {"amsgrad": True}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "adamw fused": (torch.optim.AdamW, {"fused": True}),
    "adamw amsgrad foreach": (torch.optim.AdamW, {"amsgrad": True, "foreach": True}),
    "nadam": (torch.optim.NAdam, {}),
    "nadam foreach": (torch.optim.NAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True, "foreach": True}),
    "radam": (torch.optim.RAdam, {}),
    "radam foreach": (torch.optim.RAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True, "foreach": True}),
    "rmsprop": (torch.optim.RMSprop, {}),
    "rmsprop centered": (torch.optim.RMSprop, {"centered": True}),
    "rmsprop momentum": (torch.optim.RMSprop, {"momentum": 0.9, "eps": 0.0}),
    "rmsprop foreach": (torch.optim.RMSprop, {"centered": True, "foreach": True}),
    "adagrad": (torch.optim.Adagrad, {}),
    "adagrad foreach": (torch.optim.Adagrad, {"lr_decay": 0.1, "foreach": True}),
    "adagrad fused": (torch.optim.Adagrad, {"fused": True}),
    "muon": (torch.optim.Muon, {"weight_decay": 0.1, "momentum": 0.9}),
    "lion": (Lion, {"weight_decay": 0.1}),
    "stable adamw": (StableAdamW, {"weight_decay": 0.1, "eps": 1e-12, "triton": False}),
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


@pytest.mark.slow
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
                kinds = state_kinds(optimizer)
                scale_gradients_and_states(optimizer, kinds, [A], [BETA.expand(A.shape)])
                scale_gradients_and_states(optimizer, kinds, [B], [ALPHA[:, None].expand(B.shape)])
            optimizer.step()
            optimizer.zero_grad()
            layer = layer_of(model)
            if t >= k:
                trajectory.append((layer.lora_A["default"].weight.clone(), layer.lora_B["default"].weight.clone()))
        trajectories.append(trajectory)
    assert not torch.equal(trajectories[0][0][0], trajectories[0][-1][0])
    for expected, actual in zip(*trajectories, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def stand_in(qualified_name):
    """An optimizer of that name, for packages that only the Trainer's options need."""
    module, name = qualified_name.rsplit(".", 1)
    return type(name, (torch.optim.Optimizer,), {"__module__": module})


def parameter():
    return torch.nn.Parameter(torch.randn(4, 3))


@pytest.mark.parametrize(
    ("optimizer", "reason"),
    [
        (lambda p: torch.optim.Adafactor([p]), "Adafactor.*factored"),
        (lambda p: torch.optim.LBFGS([p]), "LBFGS"),
        (lambda p: torch.optim.Adamax([p]), "Adamax"),
        (lambda p: torch.optim.ASGD([p]), "ASGD.*averages the parameters"),
        (lambda p: AdamWScheduleFree([p]), "AdamWScheduleFree.*averages the parameters.*schedule"),
        (lambda p: RAdamScheduleFree([p]), "RAdamScheduleFree.*averages the parameters"),
        (lambda p: SGDScheduleFree([p]), "SGDScheduleFree.*averages the parameters"),
        (lambda p: stand_in("galore_torch.adamw.AdamW")([p], {}), "galore_torch.*projected space"),
        (lambda p: stand_in("apollo_torch.apollo.AdamW")([p], {}), "apollo_torch.*projected space"),
        (lambda p: stand_in("torchao.optim.adam.AdamW8bit")([p], {}), "torchao.*bitsandbytes"),
        (lambda p: stand_in("lomo_optim.adalomo.AdaLomo")([p], {}), "AdaLomo.*backward pass"),
        (lambda p: stand_in("grokadamw.grokadamw.GrokAdamW")([p], {}), "GrokAdamW.*parameter group"),
        (lambda p: stand_in("prodigyopt.prodigy.Prodigy")([p], {}), "Prodigy.*start"),
        (lambda p: StableAdamW([p.detach().bfloat16()], 1e-3), "StableAdamW.*kahan_sum=False"),
        (lambda p: StableAdamW([p], 1e-3, gradient_release=True), "StableAdamW.*gradient_release"),
        (lambda p: type("Mine", (torch.optim.AdamW,), {})([p]), "Mine.*register_optimizer"),
        (lambda p: torch.optim.Adam([p], weight_decay=0.1), "weight_decay=0.1"),
        (lambda p: torch.optim.SGD([p], weight_decay=0.1), "weight_decay=0.1"),
        (lambda p: torch.optim.Adagrad([p], initial_accumulator_value=0.5), "initial_accumulator_value"),
    ],
)
def test_what_cannot_be_carried_is_refused_by_name(optimizer, reason):
    with pytest.raises(UnsupportedOptimizerError, match=reason) as error:
        state_kinds(optimizer(parameter()))
    assert "AdamW" in str(error.value)
    assert "\n" not in str(error.value)


def test_stable_adamw_in_half_precision_without_kahan_sum_is_carried():
    optimizer = StableAdamW([torch.nn.Parameter(torch.randn(4, 3, dtype=torch.bfloat16))], 1e-3, kahan_sum=False)
    assert state_kinds(optimizer) == {"exp_avg": "linear", "exp_avg_sq": 2}


@pytest.fixture
def double_default():
    # The step count takes the default dtype, and a compiled Adam computes its bias corrections from it in that dtype.
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.usefixtures("double_default")
@pytest.mark.parametrize("form", ["step = compile(optimizer.step)", "optimizer.step = compile(optimizer.step)"])
@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (torch.optim.AdamW, {"foreach": True}),
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.SGD, {"momentum": 0.9}),
    ],
)
def test_a_compiled_step_rescales_and_changes_nothing(cls, settings, form):
    batches = [(torch.randn(8, 12), torch.randn(8, 6)) for _ in range(15)]
    finals = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = with_lora(TwoLayers(), dtype=torch.float64, r=3, target_modules=["first", "second"])
        optimizer = cls(trainable(model), lr=1e-2, **settings)
        engine = ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=2, interval=3))
        step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
        if form.startswith("optimizer"):
            optimizer.step = step
        for x, y in batches:
            torch.nn.functional.mse_loss(model(x), y).backward()
            (optimizer.step if form.startswith("optimizer") else step)()
            optimizer.zero_grad()
        assert engine.state_dict()["rescales"] == 4
        assert engine.metrics()["scalora/rescales"] == 4
        finals.append([p.detach().clone() for p in model.parameters()])
    torch.testing.assert_close(finals[1], finals[0], rtol=1e-6, atol=1e-9)


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
        state_kinds(optimizer)
    register_optimizer(Signum, {"momentum": 1})
    p.grad = torch.ones_like(p)
    optimizer.step()
    factor = torch.tensor([1.0, 2.0, 3.0]).expand(p.shape)
    scale_gradients_and_states(optimizer, state_kinds(optimizer), [p], [factor])
    assert optimizer.state[p]["momentum"][0].tolist() == [1.0, 2.0, 3.0]
    register_optimizer(Signum, {"other": 1})
    with pytest.raises(UnsupportedOptimizerError, match="'momentum'"):
        scale_gradients_and_states(optimizer, state_kinds(optimizer), [p], [factor])
    for kind in (-1, True):
        with pytest.raises(ValueError, match="degree"):
            register_optimizer(Signum, {"momentum": kind})
