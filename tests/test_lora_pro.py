"""LoRA-Pro against dense least squares: the best equivalent gradient, then the nearest pair that has it."""

import pytest
import torch
from models import TwoLayers, backward, with_lora
from transformers import TrainingArguments

from scalora.model.adapters import find_lora_pairs
from scalora.rivals.lora_pro import LoraPro, adjusted_gradients, create_lora_pro_optimizer, equivalent_gradient

TARGETS = {"target_modules": ["first", "second"], "r": 3, "lora_alpha": 4}
M, N, R = 9, 7, 3


def factors(seed=0, zero_B=False):
    torch.manual_seed(seed)
    A, B, G = torch.randn(R, N).double(), torch.randn(M, R).double(), torch.randn(M, N).double()
    return A, B * (not zero_B), G


def weight_movement(A, B, s):
    """The matrix K with K·vec(dA, dB) = vec(s·(dB·A + B·dA)), rows of each matrix one after another."""
    m, n = B.shape[0], A.shape[1]
    return s * torch.cat([torch.kron(B, torch.eye(n).to(A)), torch.kron(torch.eye(m).to(A), A.mT.contiguous())], dim=1)


def nearest_pair(A, B, target, s):
    """Of all (dA, dB) that move the weight nearest the target, the one nearest LoRA's gradients of the target."""
    K = weight_movement(A, B, s)
    lora = torch.cat([(s * B.mT @ target).flatten(), (s * target @ A.mT).flatten()])
    pair = lora + torch.linalg.pinv(K, rtol=1e-10) @ (target.flatten() - K @ lora)
    return pair[: A.numel()].reshape(A.shape), pair[A.numel() :].reshape(B.shape)


@pytest.mark.parametrize("s", [1.0, 2.5])
@pytest.mark.parametrize("zero_B", [False, True])
def test_the_equivalent_gradient_is_the_least_squares_optimum(s, zero_B):
    A, B, G = factors(zero_B=zero_B)
    K = weight_movement(A, B, s)
    optimum = (K @ torch.linalg.lstsq(K, G.flatten(), driver="gelsd").solution).reshape(M, N)
    lora_gradients = s * B.mT @ G, s * G @ A.mT
    torch.testing.assert_close(equivalent_gradient(A, B, *lora_gradients, s), optimum, rtol=1e-6, atol=1e-6)
    dA, dB = adjusted_gradients(A, B, *lora_gradients, s)
    torch.testing.assert_close(s * (dB @ A + B @ dA), optimum, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("s", [1.0, 2.5])
def test_x_solves_the_sylvester_equation_and_no_other_x_is_nearer_loras_gradients(s):
    A, B, G = factors()
    grad_A, grad_B = s * B.mT @ G, s * G @ A.mT
    dA, dB = adjusted_gradients(A, B, grad_A, grad_B, s)
    X = -torch.linalg.solve(B.mT @ B, B.mT @ dB)
    right = -torch.linalg.solve(B.mT @ B, grad_A @ A.mT) / s**2
    torch.testing.assert_close(B.mT @ B @ X + X @ A @ A.mT, right, rtol=1e-5, atol=1e-6)

    def distance(other):
        return ((dA + other @ A - grad_A).square().sum() + (dB - B @ other - grad_B).square().sum()).item()

    best = distance(torch.zeros(R, R).double())
    for scale in (1e-2, 1e-1, 1.0):
        for _ in range(20):
            assert distance(scale * torch.randn(R, R).double()) > best


def test_an_ill_conditioned_factor_in_single_precision_loses_nothing():
    A, B, G = factors()
    B = B * torch.tensor([1, 1e-2, 1e-3]).double()
    single = [tensor.float() for tensor in (A, B, B.mT @ G, G @ A.mT)]
    double = [tensor.double() for tensor in single]
    for got, expected in zip(adjusted_gradients(*single, 1.0), adjusted_gradients(*double, 1.0), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected.float())


@pytest.mark.parametrize("random_B", [True, False])
def test_steps_are_adamw_steps_of_the_equivalent_gradient_brought_back_to_the_factors(random_B):
    lr, decay, eps, betas = 0.05, 0.1, 1e-6, (0.8, 0.9)
    model = with_lora(TwoLayers(), random_B=random_B, **TARGETS).double()
    optimizer = create_lora_pro_optimizer(model, lr=lr, betas=betas, eps=eps, weight_decay=decay)
    pairs = find_lora_pairs(model)
    factors = {p.name: (p.lora_A.detach().clone(), p.lora_B.detach().clone()) for p in pairs}
    moments = {p.name: (0.0, 0.0) for p in pairs}
    for step in (1, 2):
        backward(model)
        for pair in pairs:
            A, B = factors[pair.name]
            s = pair.scaling
            # The full gradient, up to what neither factor sees.
            P_A, P_B = torch.linalg.pinv(A) @ A, B @ torch.linalg.pinv(B)
            from_A, from_B = torch.linalg.pinv(B).mT @ pair.lora_A.grad / s, pair.lora_B.grad @ torch.linalg.pinv(A).mT
            equivalent = from_A + (torch.eye(len(B)).double() - P_B) @ from_B / s @ P_A
            first, second = moments[pair.name]
            first = betas[0] * first + (1 - betas[0]) * equivalent
            second = betas[1] * second + (1 - betas[1]) * equivalent**2
            moments[pair.name] = first, second
            direction = first / (1 - betas[0] ** step) / ((second / (1 - betas[1] ** step)).sqrt() + eps)
            dA, dB = nearest_pair(A, B, direction, s)
            factors[pair.name] = (1 - lr * decay) * A - lr * dA, (1 - lr * decay) * B - lr * dB
        optimizer.step()
        for pair in pairs:
            A, B = factors[pair.name]
            torch.testing.assert_close(pair.lora_A.detach(), A, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(pair.lora_B.detach(), B, rtol=1e-4, atol=1e-5)
            # The next step starts from the optimizer's own numbers, so that rounding does not add up.
            factors[pair.name] = pair.lora_A.detach().clone(), pair.lora_B.detach().clone()


def test_the_moments_are_of_the_weights_size():
    model = with_lora(TwoLayers(), **TARGETS)
    optimizer = create_lora_pro_optimizer(model)
    backward(model)
    optimizer.step()
    for pair in find_lora_pairs(model):
        state = optimizer.state[pair.lora_A]
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == pair.weight.shape


def test_layers_without_gradients_are_left_alone():
    model = with_lora(TwoLayers(), **TARGETS)
    optimizer = create_lora_pro_optimizer(model)
    backward(model)
    unused, used = find_lora_pairs(model)
    unused.lora_A.grad = unused.lora_B.grad = None
    before = [p.detach().clone() for p in (unused.lora_A, unused.lora_B, used.lora_A)]
    optimizer.step()
    assert torch.equal(unused.lora_A, before[0])
    assert torch.equal(unused.lora_B, before[1])
    assert not torch.equal(used.lora_A, before[2])


@pytest.mark.slow
def test_a_closure_is_called_with_gradients_on_and_its_loss_returned():
    model = with_lora(TwoLayers(), **TARGETS)
    optimizer = create_lora_pro_optimizer(model)
    losses = [optimizer.step(lambda: backward(model)) for _ in range(20)]
    assert losses[-1] < losses[0]


def test_the_method_takes_the_trainers_settings(tmp_path):
    model = with_lora(TwoLayers(), **TARGETS)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        learning_rate=3e-4,
        adam_beta1=0.7,
        adam_beta2=0.8,
        adam_epsilon=1e-5,
        weight_decay=0.2,
    )
    group = LoraPro().optimizer(model, arguments).param_groups[0]
    settings = (group["lr"], group["betas"], group["eps"], group["weight_decay"])
    assert settings == (3e-4, (0.7, 0.8), 1e-5, 0.2)
