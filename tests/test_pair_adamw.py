"""`scalora.PairAdamW`: its state follows any change of the factors, and its steps mean the same for every layer."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from scalora import PairAdamW, UnsupportedLayerError
from scalora.maths.pair_moments import Corrections, directions, update_moments
from scalora.rescale.optimizers import state_kinds
from scalora.rescale.transport import transform_gradients_and_states


def adapted(m: int = 12, n: int = 9, r: int = 3, *, alpha: float | None = None, layers: int = 1) -> nn.Module:
    """A float64 model of linear layers with LoRA, whose lora_B is random."""
    torch.manual_seed(0)
    model = nn.ModuleDict({f"layer{i}": nn.Linear(n, m, bias=False) for i in range(layers)}).double()
    config = LoraConfig(r=r, lora_alpha=alpha or r, target_modules=list(model))
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def layer_of(model: nn.Module, index: int = 0) -> nn.Module:
    return model.base_model.model[f"layer{index}"]


def factors_of(model: nn.Module, index: int = 0) -> tuple[nn.Parameter, nn.Parameter]:
    layer = layer_of(model, index)
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def set_gradients(model: nn.Module, gradients: list[Tensor]) -> None:
    """The gradients of the factors, for given gradients of the layers' weights."""
    for index, G in enumerate(gradients):
        lora_A, lora_B = factors_of(model, index)
        s = layer_of(model, index).scaling["default"]
        lora_B.grad, lora_A.grad = s * G @ lora_A.detach().mT, s * lora_B.detach().mT @ G


def weight_of(model: nn.Module, index: int = 0) -> Tensor:
    layer = layer_of(model, index)
    return (layer.base_layer.weight + layer.get_delta_weight("default")).detach().clone()


def muon(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Muon([p for p in model.parameters() if p.requires_grad], lr=0.0, momentum=0.9, weight_decay=0.0)


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0, momentum=0.9)


def pair_adamw(model: nn.Module) -> torch.optim.Optimizer:
    return PairAdamW(model, lr=0.0)


@pytest.mark.parametrize("make", [momentum, muon, pair_adamw])
@pytest.mark.parametrize(("m", "n", "r"), [(12, 9, 3), (7, 16, 5), (4, 10, 4), (6, 6, 1)])
def test_the_state_is_what_it_would_be_with_factors_changed_from_the_start(make, m, n, r):
    generator = torch.Generator().manual_seed(m * n + r)
    changed, from_the_start = adapted(m, n, r), adapted(m, n, r)
    optimizer, truth = make(changed), make(from_the_start)
    matrices = {step: [torch.randn(r, r, generator=generator).double() for _ in range(2)] for step in (1, 4, 5, 9)}
    lora_A, lora_B = factors_of(from_the_start)
    for P, Q in matrices.values():
        lora_B.data, lora_A.data = lora_B.data @ P, Q.mT @ lora_A.data
    for step in range(12):
        G = torch.randn(m, n, generator=generator).double()
        set_gradients(changed, [G])
        set_gradients(from_the_start, [G])
        if step in matrices:
            P, Q = matrices[step]
            lora_A, lora_B = factors_of(changed)
            lora_B.data, lora_A.data = lora_B.data @ P, Q.mT @ lora_A.data
            kinds = state_kinds(optimizer, "matrix")
            transform_gradients_and_states(optimizer, kinds, [lora_B], Q[None], torch.tensor([True]), tall=True)
            transform_gradients_and_states(optimizer, kinds, [lora_A], P[None], torch.tensor([True]), tall=False)
        optimizer.step()
        truth.step()
    for mine, true in zip(factors_of(changed), factors_of(from_the_start), strict=True):
        assert optimizer.state[mine].keys() == truth.state[true].keys()
        for key, value in truth.state[true].items():
            atol = 1e-10 * float(value.abs().max())
            torch.testing.assert_close(optimizer.state[mine][key], value, rtol=1e-10, atol=atol)


@pytest.mark.parametrize(
    ("m", "n", "r", "alpha"), [(64, 64, 8, 8), (64, 64, 8, 32), (128, 32, 4, 4), (32, 200, 16, 4), (96, 96, 1, 1)]
)
def test_the_learning_rate_is_how_far_an_entry_of_the_weight_moves(m, n, r, alpha):
    model = adapted(m, n, r, alpha=alpha)
    optimizer = PairAdamW(model, lr=1e-4)
    before = weight_of(model)
    set_gradients(model, [torch.randn(m, n, generator=torch.Generator().manual_seed(1)).double()])
    optimizer.step()
    moved = (weight_of(model) - before).square().mean().sqrt()
    assert float(moved) == pytest.approx(1e-4, rel=0.25)


def test_layers_are_stepped_together_as_they_would_be_one_by_one():
    gradients = [torch.randn(12, 9, generator=torch.Generator().manual_seed(i)).double() for i in range(3)]
    together = adapted(layers=3)
    alone = [copy.deepcopy(together) for _ in range(3)]
    optimizer, single = PairAdamW(together, lr=0.01), [PairAdamW(model, lr=0.01) for model in alone]
    for _ in range(3):
        set_gradients(together, gradients)
        optimizer.step()
        for index, model in enumerate(alone):
            set_gradients(model, gradients)
            for other in range(3):
                if other != index:
                    for factor in factors_of(model, other):
                        factor.grad = None
            single[index].step()
    for index, model in enumerate(alone):
        torch.testing.assert_close(weight_of(together, index), weight_of(model, index), rtol=1e-12, atol=1e-12)


def test_groups_have_rates_and_decays_of_their_own():
    model = adapted(layers=2)
    groups = [
        {"params": factors_of(model, 0), "lr": 1e-3},
        {"params": factors_of(model, 1), "lr": 0.0, "weight_decay": 0.1},
    ]
    optimizer = PairAdamW(model, groups)
    before = [weight_of(model, index) for index in range(2)]
    set_gradients(model, [torch.ones(12, 9).double()] * 2)
    optimizer.step()
    assert not torch.equal(weight_of(model, 0), before[0])
    assert torch.equal(weight_of(model, 1), before[1])


def test_weight_decay_decays_the_product():
    model = adapted()
    optimizer = PairAdamW(model, lr=1e-3, weight_decay=0.5)
    product = layer_of(model).get_delta_weight("default").detach().clone()
    set_gradients(model, [torch.zeros(12, 9).double()])
    optimizer.step()
    torch.testing.assert_close(layer_of(model).get_delta_weight("default"), product * (1 - 1e-3 * 0.5))


def test_other_parameters_are_stepped_as_adamw_steps_them():
    class WithHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.body(x)))

    torch.manual_seed(0)
    model = get_peft_model(WithHead(), LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"]))
    optimizer = PairAdamW(model, lr=0.01, weight_decay=0.1)
    head = model.base_model.model.head.modules_to_save["default"]
    twin = copy.deepcopy(head)
    truth = torch.optim.AdamW(twin.parameters(), lr=0.01, weight_decay=0.1)
    for step in range(3):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        for mine, true in zip(head.parameters(), twin.parameters(), strict=True):
            true.grad = mine.grad.clone()
        optimizer.step()
        truth.step()
        optimizer.zero_grad()
    for mine, true in zip(head.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, true)


def test_a_loaded_state_continues_to_the_bit_in_float32():
    model = adapted().float()
    optimizer = PairAdamW(model, lr=0.01)
    gradients = [torch.randn(12, 9, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    for G in gradients[:3]:
        set_gradients(model, [G])
        optimizer.step()
    resumed = copy.deepcopy(model)
    other = PairAdamW(resumed, lr=0.01)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for G in gradients[3:]:
        for each, of_each in ((model, optimizer), (resumed, other)):
            set_gradients(each, [G])
            of_each.step()
    assert torch.equal(weight_of(model), weight_of(resumed))


def test_the_state_is_smaller_than_adamws():
    model = adapted(576, 192, 8).float()  # SmolLM2's smallest layer
    set_gradients(model, [torch.ones(576, 192)])

    def size(optimizer: torch.optim.Optimizer) -> int:
        optimizer.step()
        return sum(v.nbytes for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))

    assert size(PairAdamW(model)) < 0.6 * size(torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]))


def test_factors_without_gradients_or_with_zero_ones_stay():
    model = adapted(layers=2)
    optimizer = PairAdamW(model, lr=0.1)
    before = [weight_of(model, index) for index in range(2)]
    set_gradients(model, [torch.zeros(12, 9).double()])
    optimizer.step()
    assert all(torch.equal(weight_of(model, index), before[index]) for index in range(2))


def test_from_lora_b_zero_all_factors_soon_move_and_stay_finite():
    model = adapted()
    lora_A, lora_B = factors_of(model)
    lora_B.data.zero_()
    optimizer = PairAdamW(model, lr=1e-3)
    before = lora_A.detach().clone()
    for step in range(3):
        set_gradients(model, [torch.randn(12, 9, generator=torch.Generator().manual_seed(step)).double()])
        optimizer.step()
    assert all(factor.isfinite().all() for factor in (lora_A, lora_B))
    assert not torch.equal(lora_A, before)


@settings(deadline=None, max_examples=40)
@given(
    r=st.sampled_from([2, 8, 32, 48]),
    share=st.floats(0, 1),
    decades=st.floats(0, 3),
    scale=st.floats(-6, 2),
    seed=st.integers(0, 2**16),
)
def test_gradients_of_fewer_directions_than_columns_move_all_rows_alike(r, share, decades, scale, seed):
    """As in the first steps of a run with few tokens, in float32, whose rounding must not count as a direction."""
    generator = torch.Generator().manual_seed(seed)
    rank = max(1, round(share * r))
    columns = torch.randn(rank, r, generator=generator) * torch.logspace(0, -decades, r)
    gradient = 10**scale * torch.randn(3, 256, rank, generator=generator) @ columns
    first, row_weights = torch.zeros_like(gradient), torch.zeros(3, 256)
    second = torch.zeros(3, r, r, dtype=torch.float64)
    betas = (0.9, 0.999)
    corrections = Corrections.after(1, betas)
    update_moments([gradient], [first], [second], [row_weights], betas=betas, corrections=corrections)
    (step,) = directions([first], [second], [row_weights], corrections=corrections, eps=1e-12)
    # The mean of g·V⁻¹·gᵀ over rows is the rank of V.
    torch.testing.assert_close(row_weights.mean(-1) / (1 - 0.999), torch.full((3,), rank / r), rtol=0.01, atol=0)
    torch.testing.assert_close(step.square().mean(-1).sqrt(), torch.ones(3, 256), rtol=0.15, atol=0)


def test_a_gradient_of_rank_one_moves_the_weight_by_a_finite_step():
    model = adapted()
    optimizer = PairAdamW(model, lr=1e-3)
    before = weight_of(model)
    set_gradients(model, [torch.outer(torch.ones(12), torch.arange(9.0)).double()])
    optimizer.step()
    moved = (weight_of(model) - before).square().mean().sqrt()
    assert 0 < float(moved) < 2e-3


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"lr": -1.0}, "lr"), ({"betas": (0.9, 1.0)}, "betas"), ({"weight_decay": math.nan}, "weight_decay")],
)
def test_a_setting_out_of_range_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        PairAdamW(adapted(), **settings)


def test_half_a_pair_is_refused():
    model = adapted()
    with pytest.raises(ValueError, match=r"layer0.*lora_A and lora_B"):
        PairAdamW(model, [factors_of(model)[0]])


def test_a_model_without_lora_is_refused():
    with pytest.raises(UnsupportedLayerError, match="no LoRA layers"):
        PairAdamW(nn.Linear(3, 3))


def test_the_default_rate_falls_with_the_width_of_the_model():
    shapes = {"narrow": (4, 8), "square": (16, 16), "wide": (64, 16)}
    model = nn.ModuleDict({name: nn.Linear(n, m, bias=False) for name, (m, n) in shapes.items()})
    model = get_peft_model(model, LoraConfig(r=2, target_modules=list(shapes)))
    assert PairAdamW(model).defaults["lr"] == pytest.approx(4e-4 * 576 / 16)
    assert PairAdamW(model, lr=0.0).defaults["lr"] == 0
    assert PairAdamW(adapted(1536, 576)).defaults["lr"] == pytest.approx(4e-4)
    assert PairAdamW(adapted(14336, 4096)).defaults["lr"] == pytest.approx(5.6e-5, rel=0.01)
