"""LoRA-RITE: blind to the factoring of a product, and the paper's algorithm step by step."""

import copy
import math

import pytest
import torch
from models import TwoLayers, backward, with_lora
from torch.optim import AdamW
from transformers import TrainingArguments

from scalora.model.adapters import find_lora_pairs
from scalora.rivals.lora_rite import LoraRite, create_lora_rite_optimizer

TARGETS = {"target_modules": ["first", "second"], "r": 3, "lora_alpha": 6}


def products(model):
    return [pair.lora_B.detach() @ pair.lora_A.detach() for pair in find_lora_pairs(model)]


def refactored(model):
    """The same products from other factors, by ill-scaled and not orthogonal matrices."""
    model = copy.deepcopy(model)
    torch.manual_seed(7)
    with torch.no_grad():
        for pair in find_lora_pairs(model):
            P = torch.randn(3, 3).to(pair.lora_A) @ torch.diag(torch.tensor([0.1, 1.0, 20.0]).to(pair.lora_A))
            pair.lora_B.copy_(pair.lora_B @ P)
            pair.lora_A.copy_(torch.linalg.solve(P, pair.lora_A))
    return model


def change_after_steps(model, make_optimizer, steps=6):
    before = products(model)
    optimizer = make_optimizer(model)
    for step in range(steps):
        backward(model, seed=step)
        optimizer.step()
    return [after - product for after, product in zip(products(model), before, strict=True)]


@pytest.mark.parametrize("max_unmagnified_norm", [1e-2, math.inf])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_another_factoring_of_the_same_product_takes_the_same_steps(dtype, tolerance, max_unmagnified_norm):
    model = with_lora(TwoLayers(), dtype=dtype, **TARGETS)
    other = refactored(model)

    def rite(model):
        return create_lora_rite_optimizer(model, lr=1e-2, weight_decay=0.1, max_unmagnified_norm=max_unmagnified_norm)

    def adamw(model):
        return AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    def difference(make_optimizer):
        changes = [change_after_steps(copy.deepcopy(m), make_optimizer) for m in (model, other)]
        return max(((a - b).norm() / a.norm()).item() for a, b in zip(*changes, strict=True))

    assert difference(rite) < tolerance
    assert difference(adamw) > 0.1


def polar(matrix):
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U @ Vh, Vh.mT @ S.diag() @ Vh


def inverse_root(matrix, eps):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(1 / (values.sqrt() + eps)) @ vectors.mT


@pytest.mark.parametrize("max_unmagnified_norm", [0.05, 100.0])
def test_steps_are_the_papers_algorithm_in_polar_bases(max_unmagnified_norm):
    lr, decay, eps, betas = 0.1, 0.2, 1e-3, (0.8, 0.9)
    model = with_lora(TwoLayers(), **TARGETS).double()
    optimizer = create_lora_rite_optimizer(
        model, lr=lr, betas=betas, eps=eps, weight_decay=decay, max_unmagnified_norm=max_unmagnified_norm
    )
    pairs = find_lora_pairs(model)
    # The paper's A (m × r) and B (n × r), each under its place in the list, and the other one's place beside it.
    Z = [factor.detach().clone() for pair in pairs for factor in (pair.lora_B, pair.lora_A.mT)]
    partner = [place ^ 1 for place in range(len(Z))]
    state = [None] * len(Z)
    share_of_escaped = []
    for t in (1, 2, 3):
        backward(model, seed=t)
        gradients = [gradient for pair in pairs for gradient in (pair.lora_B.grad, pair.lora_A.grad.mT)]
        decomposed = [polar(factor) for factor in Z]
        unmagnified = [g @ decomposed[j][1].inverse() for g, j in zip(gradients, partner, strict=True)]
        norm = torch.cat([g.flatten() for g in unmagnified]).norm().item()
        assert (norm > max_unmagnified_norm) == (max_unmagnified_norm == 0.05)
        beta1, beta2 = (beta * (1 - beta ** (t - 1)) / (1 - beta**t) for beta in betas)
        steps = []
        for place, g in enumerate(unmagnified):
            g = g * min(1, max_unmagnified_norm / norm)
            basis, R = decomposed[partner[place]]
            old_basis, V, rho, M = state[place] or (basis, torch.zeros(3, 3).double(), 0.0, torch.zeros_like(g))
            P = basis.mT @ old_basis
            carried = P @ V @ P.mT
            lost = torch.linalg.eigvalsh(V) - torch.linalg.eigvalsh((carried + carried.mT) / 2)
            rho = beta2 * (rho + max(0.0, min(lost.max().item(), (V.trace() - carried.trace()).item())))
            V = beta2 * carried + (1 - beta2) * g.mT @ g / len(g)
            S = g @ inverse_root(V + rho * torch.eye(3).double(), eps)
            M = beta1 * M @ P.mT + (1 - beta1) * S
            state[place] = basis, V, rho, M
            share_of_escaped.append(rho / V.trace().item())
            steps.append(-lr * M @ torch.linalg.inv(R).mT - lr * decay * Z[place])
        Z = [factor + step for factor, step in zip(Z, steps, strict=True)]
        optimizer.step()
        for i, pair in enumerate(pairs):
            torch.testing.assert_close(pair.lora_B.detach(), Z[2 * i], rtol=1e-8, atol=1e-9)
            torch.testing.assert_close(pair.lora_A.detach().mT, Z[2 * i + 1], rtol=1e-8, atol=1e-9)
    assert max(share_of_escaped) > 0.01


def test_from_a_zero_start_lora_B_moves_first_and_training_learns():
    model = with_lora(TwoLayers(), random_B=False, **TARGETS)
    optimizer = create_lora_rite_optimizer(model, lr=1e-2)
    start = [pair.lora_A.detach().clone() for pair in find_lora_pairs(model)]
    losses = [backward(model)]
    optimizer.step()
    for pair, lora_A in zip(find_lora_pairs(model), start, strict=True):
        assert torch.equal(pair.lora_A, lora_A)
        assert pair.lora_B.abs().min() > 0
    for _ in range(40):
        losses.append(backward(model))
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]


def test_layers_without_gradients_are_left_alone():
    model = with_lora(TwoLayers(), **TARGETS)
    optimizer = create_lora_rite_optimizer(model)
    optimizer.step()
    backward(model)
    unused, used = find_lora_pairs(model)
    unused.lora_A.grad = None
    before = [p.detach().clone() for p in (unused.lora_A, unused.lora_B, used.lora_A)]
    optimizer.step()
    assert torch.equal(unused.lora_A, before[0])
    assert torch.equal(unused.lora_B, before[1])
    assert not torch.equal(used.lora_A, before[2])


def test_a_rank_above_the_layers_own_is_allowed():
    model = with_lora(TwoLayers(), random_B=False, target_modules=["second"], r=9, lora_alpha=9)
    optimizer = create_lora_rite_optimizer(model, lr=1e-2)
    losses = [optimizer.step(lambda: backward(model)) for _ in range(20)]
    assert losses[-1] < 0.9 * losses[0]


def test_the_method_takes_the_trainers_settings_and_turns_its_clipping_off(tmp_path):
    model = with_lora(TwoLayers(), **TARGETS)
    method = LoraRite(max_unmagnified_norm=math.inf)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), learning_rate=3e-4, adam_beta1=0.7, weight_decay=0.2, **method.training_defaults()
    )
    group = method.optimizer(model, arguments).param_groups[0]
    settings = (group["lr"], group["betas"], group["eps"], group["weight_decay"])
    assert settings == (3e-4, (0.7, 0.999), 1e-6, 0.2)
    assert arguments.max_grad_norm == 0
