"""RefLoRA and RefLoRA-S: the closed forms against minimisers of the bound, and steps against steps written out."""

import math

import pytest
import torch
from datasets import Dataset
from models import TwoLayers, tiny_llama, trainable, with_lora
from scipy.optimize import minimize, minimize_scalar
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from scalora import UnsupportedOptimizerError
from scalora.rivals.reflora import (
    GradientRefactorer,
    RefLora,
    RefLoraS,
    ScalarRefactorer,
    optimal_refactoring,
    optimal_scalar,
)

RATE = 1e-2


def factors(m, n, r, seed=0):
    """Badly conditioned and far from balanced."""
    generator = torch.Generator().manual_seed(seed)
    make = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    return 0.03 * make(m, r) @ make(r, r), 2 * make(n, r) @ make(r, r)


def bound(A, B, S):
    """What the paper's bound grows with, for 1/(Lη) below the least value of the first two terms."""
    least = 2 * torch.linalg.svdvals(A @ B.T).sum()
    traces = torch.trace(A @ S @ A.T) + torch.trace(B @ torch.linalg.inv(S) @ B.T)
    return (traces - 0.9 * least) ** 2


@pytest.mark.parametrize(("m", "n", "r", "seed"), [(7, 5, 1, 0), (9, 6, 2, 1), (6, 12, 3, 2), (10, 10, 4, 3)])
def test_no_positive_definite_S_has_a_smaller_bound(m, n, r, seed):
    A, B = factors(m, n, r, seed)
    P, Q, usable = optimal_refactoring(A, B)
    assert usable
    S = P @ P.T
    lower = torch.tril_indices(r, r)

    def cholesky(x):
        triangle = torch.zeros(r, r, dtype=torch.float64)
        triangle[lower[0], lower[1]] = x
        return triangle.tril(-1) + torch.diag(triangle.diagonal().exp())

    def value_and_gradient(x):
        x = torch.tensor(x, requires_grad=True)
        L = cholesky(x)
        value = bound(A, B, L @ L.T)
        value.backward()
        return value.item(), x.grad.numpy()

    start = torch.zeros(lower.shape[1], dtype=torch.float64).numpy()
    options = {"maxiter": 5000, "ftol": 1e-15, "gtol": 1e-9}
    L = cholesky(torch.tensor(minimize(value_and_gradient, start, jac=True, method="L-BFGS-B", options=options).x))
    torch.testing.assert_close(L @ L.T, S, rtol=1e-3, atol=1e-4 * S.abs().max().item())
    assert bound(A, B, S) <= bound(A, B, L @ L.T) * (1 + 1e-12)
    # The least value itself, and the paper's formula with matrix square roots.
    least = 2 * torch.linalg.svdvals(A @ B.T).sum()
    torch.testing.assert_close(bound(A, B, S), (0.1 * least) ** 2)
    root = matrix_power(A.T @ A, 0.5)
    inverse = torch.linalg.inv(root)
    torch.testing.assert_close(S, inverse @ matrix_power(root @ B.T @ B @ root, 0.5) @ inverse)
    torch.testing.assert_close(Q @ Q.T, torch.linalg.inv(S))


def matrix_power(matrix, exponent):
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values**exponent) @ vectors.T


@pytest.mark.parametrize("seed", range(3))
def test_no_multiple_of_the_identity_has_a_smaller_bound_than_the_scalar(seed):
    A, B = factors(8, 6, 3, seed)
    identity = torch.eye(3, dtype=torch.float64)
    best = minimize_scalar(lambda x: bound(A, B, math.exp(x) * identity).item(), bracket=(-5, 5), tol=1e-10)
    torch.testing.assert_close(optimal_scalar(A, B).log().item(), best.x, rtol=0, atol=1e-5)


def test_the_refactored_pair_has_the_same_product_and_equal_gram_matrices():
    A, B = (torch.stack(each) for each in zip(factors(9, 7, 3, 0), factors(9, 7, 3, 1), strict=True))
    P, Q, usable = optimal_refactoring(A, B)
    assert usable.tolist() == [True, True]
    torch.testing.assert_close((A @ P) @ (B @ Q).mT, A @ B.mT)
    torch.testing.assert_close((A @ P).mT @ (A @ P), (B @ Q).mT @ (B @ Q))
    assert not torch.allclose(A.mT @ A, B.mT @ B, rtol=0.5)
    torch.testing.assert_close(P[1] @ P[1].T, (lambda r: r.P @ r.P.T)(optimal_refactoring(A[1], B[1])))


@pytest.mark.parametrize("broken", ["zero", "deficient", "nan", "inf"])
def test_only_the_layer_without_full_rank_is_left_alone(broken):
    A, B = (torch.stack(each) for each in zip(factors(9, 7, 3, 0), factors(9, 7, 3, 1), strict=True))
    A[0] = {
        "zero": torch.zeros(9, 3),
        "deficient": A[0, :, :1].expand(9, 3) * torch.tensor([1.0, 2.0, 3.0]),
        "nan": torch.full((9, 3), math.nan),
        "inf": torch.full((9, 3), math.inf),
    }[broken]
    P, Q, usable = optimal_refactoring(A, B)
    assert usable.tolist() == [False, True]
    assert torch.equal(P[0], torch.eye(3, dtype=torch.float64))
    assert torch.equal(Q[0], torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(P[1], optimal_refactoring(A[1], B[1]).P)
    assert (optimal_scalar(A, B)[0] == 1) == (broken != "deficient")
    assert optimal_scalar(A, B)[1] == B[1].norm() / A[1].norm()


def test_a_rank_that_is_deficient_up_to_rounding_is_not_taken_for_full():
    A, B = (torch.stack(each) for each in zip(*(factors(9, 7, 3, seed) for seed in range(20)), strict=True))
    dependent, tiny = A.clone(), A.clone()
    dependent[..., 2] = A[..., 0] - 2 * A[..., 1]
    tiny[..., 2] *= 1e-30
    for deficient in (dependent, tiny):
        assert not optimal_refactoring(deficient, B).usable.any()
        assert not optimal_refactoring(B, deficient).usable.any()
    assert optimal_refactoring(A, B).usable.all()


def batch(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, width, generator=generator).double() for width in (12, 6)]


def backward(model, seed=1):
    x, y = batch(seed)
    loss = torch.nn.functional.mse_loss(model(x), y)
    loss.backward()
    return loss.item()


def two_layers(**settings):
    """Two adapted layers, of different shapes, with a scaling of 2."""
    settings = {"dtype": torch.float64, "r": 3, "lora_alpha": 6, "target_modules": ["first", "second"]} | settings
    return with_lora(TwoLayers(), **settings)


def pairs(model):
    """(A, B transposed), the paper's, of each layer."""
    layers = (model.base_model.model.first, model.base_model.model.second)
    return [(layer.lora_B["default"].weight, layer.lora_A["default"].weight) for layer in layers]


def products(model):
    return [(A @ Bt).detach() for A, Bt in pairs(model)]


def test_a_step_is_that_of_the_refactored_pair_taken_back():
    model, rate = two_layers(), 0.3
    optimizer = torch.optim.SGD(trainable(model), lr=rate)
    GradientRefactorer(model, optimizer)
    backward(model)
    expected = []
    for A, Bt in pairs(model):
        root = matrix_power((A.T @ A).detach(), 0.5)
        inverse = torch.linalg.inv(root)
        P = matrix_power(inverse @ matrix_power(root @ (Bt @ Bt.T).detach() @ root, 0.5) @ inverse, 0.5)
        # The gradients of the refactored pair are P's inverse transposed and P times those of the pair.
        refactored_A = A @ P - rate * A.grad @ torch.linalg.inv(P).T
        refactored_Bt = torch.linalg.inv(P) @ Bt - rate * P.T @ Bt.grad
        expected.append((refactored_A @ torch.linalg.inv(P), P @ refactored_Bt))
    plain = [(A - rate * A.grad, Bt - rate * Bt.grad) for A, Bt in pairs(model)]
    optimizer.step()
    for (A, Bt), (expected_A, expected_Bt), (plain_A, _) in zip(pairs(model), expected, plain, strict=True):
        torch.testing.assert_close(A, expected_A)
        torch.testing.assert_close(Bt, expected_Bt)
        assert not torch.allclose(A, plain_A, rtol=1e-2)


@pytest.mark.parametrize("refactorer", [GradientRefactorer, ScalarRefactorer])
def test_the_function_moves_as_the_refactored_adapters_gradients_say(refactorer):
    # To first order in the rate: ΔW = −η·s²·(G·B̃·B̃ᵀ + Ã·Ãᵀ·G) for the pair with ÃᵀÃ = B̃ᵀB̃, or ‖Ã‖ = ‖B̃‖.
    model, rate = two_layers(), 1e-6
    before = products(model)
    optimizer = torch.optim.SGD(trainable(model), lr=rate)
    refactored = []
    for A, Bt in pairs(model):
        if refactorer is GradientRefactorer:
            U, values, Vh = torch.linalg.svd((A @ Bt).detach())
            left, right = U[:, :3] * values[:3].sqrt(), Vh[:3].T * values[:3].sqrt()
        else:
            ratio = (A.norm() / Bt.norm()).detach().sqrt()
            left, right = A.detach() / ratio, Bt.detach().T * ratio
        refactored.append((left, right))
    attached = refactorer(model, optimizer)
    for now, then in zip(products(model), before, strict=True):
        torch.testing.assert_close(now, then)
    for module in (model.base_model.model.first, model.base_model.model.second):
        module.base_layer.weight.requires_grad_(True)
    backward(model)
    G = [m.base_layer.weight.grad for m in (model.base_model.model.first, model.base_model.model.second)]
    optimizer.step()
    attached.detach()
    for now, then, gradient, (left, right) in zip(products(model), before, G, refactored, strict=True):
        move = -2 * rate * (gradient @ right @ right.T + left @ left.T @ gradient)
        torch.testing.assert_close(now - then, move, rtol=1e-3, atol=1e-4 * move.abs().max().item())


@pytest.mark.parametrize("refactorer", [GradientRefactorer, ScalarRefactorer])
def test_every_start_with_one_product_takes_the_same_step(refactorer):
    moves = []
    # RefLoRA's step does not see any invertible P, RefLoRA-S's no multiple of the identity.
    change = torch.eye(3).double() * 5
    if refactorer is GradientRefactorer:
        change += torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).double()
    for P in (torch.eye(3).double(), change):
        model = two_layers()
        with torch.no_grad():
            for A, Bt in pairs(model):
                A.copy_(A @ P)
                Bt.copy_(torch.linalg.inv(P) @ Bt)
        optimizer = torch.optim.SGD(trainable(model), lr=RATE)
        refactorer(model, optimizer)
        for step in range(5):
            optimizer.zero_grad()
            backward(model, step)
            optimizer.step()
        moves.append(products(model))
    torch.testing.assert_close(moves[0], moves[1], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_goes_on_as_if_the_adapter_had_been_scaled_from_the_start(weight_decay):
    k, steps = 4, 12
    runs = []
    scales = [math.sqrt((Bt.norm() / A.norm()).item()) for A, Bt in pairs(two_layers())]
    for from_the_start in (True, False):
        model = two_layers()
        if from_the_start:
            with torch.no_grad():
                for (A, Bt), scale in zip(pairs(model), scales, strict=True):
                    A.mul_(scale)
                    Bt.div_(scale)
        optimizer = torch.optim.AdamW(trainable(model), lr=RATE, weight_decay=weight_decay, eps=1e-14)
        trajectory = []
        for step in range(steps):
            # The moments fill while the weights stand still, so that both see the same gradients until step k.
            optimizer.param_groups[0]["lr"] = RATE if step >= k else 1e-300
            if step == k:
                if not from_the_start:
                    attached = ScalarRefactorer(model, optimizer)
                    attached.detach()
                for A, Bt in pairs(model):
                    torch.testing.assert_close(A.norm(), Bt.norm())
            optimizer.zero_grad()
            backward(model, step)
            optimizer.step()
            trajectory.append([p.detach().clone() for pair in pairs(model) for p in pair])
        runs.append(trajectory[k:])
    assert not torch.allclose(runs[0][0][0], runs[0][-1][0], atol=RATE)
    for expected, actual in zip(*runs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10)


def test_the_scalar_version_balances_after_every_step_and_keeps_the_product():
    model = two_layers()
    optimizer = torch.optim.AdamW(trainable(model), lr=RATE)
    stepped = []
    optimizer.register_step_post_hook(lambda *_: stepped.append((products(model), [a.norm() for a, _ in pairs(model)])))
    ScalarRefactorer(model, optimizer)
    for step in range(4):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        products_stepped, norms_stepped = stepped[-1]
        torch.testing.assert_close(products(model), products_stepped, rtol=1e-12, atol=1e-14)
        for (A, Bt), norm in zip(pairs(model), norms_stepped, strict=True):
            torch.testing.assert_close(A.norm(), Bt.norm())
            assert A.norm() != norm


@pytest.mark.parametrize("refactorer", [GradientRefactorer, ScalarRefactorer])
def test_the_first_step_from_pefts_start_is_plain_loras(refactorer):
    model, plain = two_layers(random_B=False), two_layers(random_B=False)
    optimizers = [torch.optim.AdamW(trainable(each), lr=RATE) for each in (model, plain)]
    refactorer(model, optimizers[0])
    for each, optimizer in zip((model, plain), optimizers, strict=True):
        backward(each)
        optimizer.step()
    torch.testing.assert_close(products(model), products(plain))
    assert all(product.norm() > 0 for product in products(model))
    for step in range(20):
        optimizers[0].zero_grad()
        backward(model, step)
        optimizers[0].step()
    assert all(p.isfinite().all() for p in trainable(model))


@pytest.mark.parametrize("refactorer", [GradientRefactorer, ScalarRefactorer])
@pytest.mark.parametrize("steps_done", [0, 2])
def test_the_warmup_is_plain_lora(refactorer, steps_done):
    model, plain = two_layers(), two_layers()
    optimizers = [torch.optim.SGD(trainable(each), lr=RATE) for each in (model, plain)]
    refactorer(model, optimizers[0], warmup_steps=3, steps_done=steps_done)
    same = []
    for step in range(5):
        for each, optimizer in zip((model, plain), optimizers, strict=True):
            optimizer.zero_grad()
            backward(each, step)
            optimizer.step()
        same.append(all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(products(model), products(plain), strict=True)))
    plain_steps = 3 - steps_done
    assert same == [True] * plain_steps + [False] * (5 - plain_steps)


@pytest.mark.slow
@pytest.mark.parametrize("refactorer", [GradientRefactorer, ScalarRefactorer])
def test_it_learns_from_an_unbalanced_adapter_with_which_plain_lora_diverges(refactorer):
    losses = []
    for attach in (lambda *_: None, refactorer):
        model = two_layers()
        with torch.no_grad():
            for A, Bt in pairs(model):
                A.mul_(4)
                Bt.div_(4)
        optimizer = torch.optim.SGD(trainable(model), lr=0.2)
        attach(model, optimizer)
        for _ in range(60):
            optimizer.zero_grad()
            losses.append(backward(model))
            optimizer.step()
    assert math.isnan(losses[59])
    assert losses[-1] < 0.6 * losses[60]


IDS = torch.randint(0, 64, (24, 8), generator=torch.Generator().manual_seed(0))


def trainer(model, folder, **settings):
    data = Dataset.from_list([{"input_ids": row, "labels": row, "attention_mask": [1] * 8} for row in IDS.tolist()])
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": False,
    }
    method = settings.pop("method")
    arguments = TrainingArguments(**defaults | settings)
    return Trainer(model, arguments, train_dataset=data, callbacks=method.callbacks())


@pytest.mark.slow
@pytest.mark.parametrize("cls", [RefLora, RefLoraS])
def test_a_trainer_gives_the_weights_of_a_loop_with_the_refactorer(cls, tmp_path):
    model, twin = (with_lora(tiny_llama(), r=2, target_modules="all-linear", random_B=False) for _ in range(2))
    trainer(model, tmp_path, method=cls(warmup_steps=2)).train()
    optimizer = torch.optim.AdamW(trainable(twin), lr=1e-2, weight_decay=0.0)
    cls.refactorer(twin, optimizer, warmup_steps=2)
    for rows in IDS.split(4):
        twin(input_ids=rows, labels=rows).loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable(twin), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("cls", [RefLora, RefLoraS])
def test_a_resumed_run_ends_where_one_that_did_not_stop_ends(cls, tmp_path):
    straight, resumed = (with_lora(tiny_llama(), r=2, target_modules="all-linear", random_B=False) for _ in range(2))
    method = cls(warmup_steps=2)
    trainer(straight, tmp_path, method=method, save_strategy="steps", save_steps=4).train()
    trainer(resumed, tmp_path, method=method).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for one, other in zip(trainable(straight), trainable(resumed), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("method", [RefLora(warmup_steps=0), RefLoraS(warmup_steps=0)])
def test_after_the_training_the_optimizer_is_as_it_was(method):
    model = two_layers()
    optimizer = torch.optim.SGD(trainable(model), lr=0.3)
    (callback,) = method.callbacks()
    of_a_trainer = TrainingArguments("unused", report_to="none"), TrainerState(), TrainerControl()
    callback.on_train_begin(*of_a_trainer, model=model, optimizer=optimizer)
    callback.on_train_end(*of_a_trainer)
    backward(model)
    expected = [p.detach() - 0.3 * p.grad for p in trainable(model)]
    optimizer.step()
    torch.testing.assert_close(list(trainable(model)), expected, rtol=1e-12, atol=1e-14)


def test_a_half_precision_adapter_becomes_float32_when_a_trainer_is_made(tmp_path):
    model = with_lora(tiny_llama(), dtype=torch.bfloat16, r=2, target_modules="all-linear")
    trainer(model, tmp_path, method=RefLora())
    assert {p.dtype for p in trainable(model)} == {torch.float32}


def test_what_can_not_be_done_is_refused():
    model = two_layers()
    with pytest.raises(UnsupportedOptimizerError, match=r"Adafactor.*factored"):
        ScalarRefactorer(model, torch.optim.Adafactor(trainable(model)))
    with pytest.raises(ValueError, match="warmup_steps=-1"):
        RefLora(warmup_steps=-1)
