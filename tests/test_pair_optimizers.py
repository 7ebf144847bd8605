"""What holds for every optimizer that steps lora_A and lora_B together."""

import copy
import io

import pytest
import torch
from models import Mixed, TwoLayers, backward, with_lora
from torch.optim import AdamW

from scalora import PairAdamW, UnsupportedOptimizerError
from scalora.model.adapters import find_lora_pairs
from scalora.rivals.lora_pro import create_lora_pro_optimizer
from scalora.rivals.lora_rite import create_lora_rite_optimizer


@pytest.mark.parametrize(
    ("create", "rate", "alpha"), [(create_lora_pro_optimizer, 1e-3, 4), (create_lora_rite_optimizer, 1e-2, 6)]
)
def test_training_resumes_exactly_from_a_state_dict(create, rate, alpha):
    model = with_lora(TwoLayers(), random_B=False, target_modules=["first", "second"], r=3, lora_alpha=alpha)
    optimizer = create(model, lr=rate)

    def train(model, optimizer):
        for _ in range(3):
            backward(model)
            optimizer.step()

    train(model, optimizer)
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    saved.seek(0)
    resumed = copy.deepcopy(model)
    resumed_optimizer = create(resumed, lr=0.5)
    resumed_optimizer.load_state_dict(torch.load(saved, weights_only=True))
    train(model, optimizer)
    train(resumed, resumed_optimizer)
    for parameter, other in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(parameter, other)


@pytest.mark.parametrize("create", [create_lora_pro_optimizer, create_lora_rite_optimizer, PairAdamW])
def test_flat_copies_in_the_places_of_the_factors_are_refused_at_the_first_step(create):
    model = with_lora(TwoLayers(), target_modules=["first", "second"], r=3)
    optimizer = create(model, lr=1e-2)
    backward(model)
    for group in optimizer.param_groups:  # as DeepSpeed does
        flat = torch.nn.Parameter(torch.cat([p.detach().flatten() for p in group["params"]]))
        flat.grad = torch.cat([p.grad.flatten() for p in group["params"]])
        group["params"] = [flat]
    with pytest.raises(UnsupportedOptimizerError, match=r"factors of module .*first.* any more, .* torch.optim.AdamW"):
        optimizer.step()


@pytest.mark.parametrize("create", [create_lora_pro_optimizer, create_lora_rite_optimizer])
def test_a_head_gets_ordinary_adamw_and_every_kind_of_layer_learns(create):
    settings = {"target_modules": ["embed", "conv1d", "linear"], "r": 2, "lora_alpha": 4, "modules_to_save": ["head"]}
    model = with_lora(Mixed(), random_B=False, **settings)
    arguments = {"lr": 1e-2, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}
    optimizer = create(model, **arguments)
    head = [p for name, p in model.named_parameters() if "head" in name and p.requires_grad]
    twins = [p.detach().clone().requires_grad_() for p in head]
    adamw = AdamW(twins, **arguments)
    tokens = torch.arange(20).reshape(4, 5)
    losses = []
    for _ in range(30):
        loss = (model(tokens) - torch.linspace(-1, 1, 60).reshape(4, 5, 3)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        for twin, parameter in zip(twins, head, strict=True):
            twin.grad = parameter.grad.clone()
        optimizer.step()
        adamw.step()
        losses.append(loss.item())
    assert len(head) == 2
    for twin, parameter in zip(twins, head, strict=True):
        torch.testing.assert_close(parameter, twin)
    assert losses[-1] < 0.5 * losses[0]
    assert all(pair.lora_A.abs().max() > 0 and pair.lora_B.abs().max() > 0 for pair in find_lora_pairs(model))
