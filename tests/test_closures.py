"""``optimizer.step(closure)``, as Lightning and L-BFGS-style loops call it, does what backward() and step() do."""

import pytest
import torch
from models import TwoLayers, backward, trainable, with_lora

from scalora import ScaLora, ScaLoraConfig, UnsupportedOptimizerError, register_optimizer
from scalora.rivals.reflora import GradientRefactorer


def adapted():
    return with_lora(TwoLayers(), r=3, target_modules=["first", "second"], lora_dropout=0.2)


def engine(model, optimizer):
    return ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=1))


def refactorer(model, optimizer):
    return GradientRefactorer(model, optimizer, warmup_steps=1)


def positional(optimizer, closure):
    return optimizer.step(closure)


def by_name(optimizer, closure):
    return optimizer.step(closure=closure)


@pytest.mark.parametrize("attach", [engine, refactorer])
@pytest.mark.parametrize("step", [positional, by_name])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_a_step_with_a_closure_is_the_step_after_its_backward_pass(kind, step, attach):
    results, losses = [], []
    for with_closure in (False, True):
        torch.manual_seed(0)
        model = adapted()
        optimizer = kind(trainable(model), lr=1e-2)
        attach(model, optimizer)
        calls = []
        for i in range(6):

            def closure(i=i, model=model, calls=calls):
                assert torch.is_grad_enabled()
                calls.append(i)
                return backward(model, seed=i)

            if with_closure:
                losses.append(step(optimizer, closure))
            else:
                losses.append(closure())
                optimizer.step()
        assert calls == list(range(6))
        results.append(model.state_dict())
    assert losses[:6] == losses[6:]
    assert all(torch.equal(value, results[1][key]) for key, value in results[0].items())


def test_a_closure_that_fails_is_no_step():
    model = adapted()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    attached = engine(model, optimizer)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert attached.step == 0


def test_a_closure_without_a_backward_pass_leaves_all_layers_alone():
    model = adapted()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    attached = engine(model, optimizer)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for _ in range(3):
        assert optimizer.step(lambda: None) is None
    assert attached.step == 3
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Twice(torch.optim.SGD):
    """Evaluates its closure a second time, as methods that look ahead do."""

    def step(self, closure=None):
        closure()
        return super().step(closure)


def test_an_optimizer_that_evaluates_a_closure_again_is_refused():
    register_optimizer(Twice, {"momentum_buffer": 1})
    model = adapted()
    optimizer = Twice(trainable(model), lr=1e-2)
    engine(model, optimizer)
    with pytest.raises(UnsupportedOptimizerError, match="more than once"):
        optimizer.step(lambda: backward(model))


class WithAnotherStep(torch.optim.AdamW):
    """What it does to its state is anyone's guess."""

    def step(self, closure=None):
        return super().step(closure)


def test_a_subclass_with_a_step_of_its_own_and_a_wrapper_that_averages_are_refused():
    class Lookahead(torch.optim.Optimizer):
        def __init__(self, optimizer):
            super().__init__(optimizer.param_groups, {})
            self.optimizer = optimizer

    model = adapted()
    with pytest.raises(
        UnsupportedOptimizerError, match=r"WithAnotherStep.*register_optimizer\(WithAnotherStep, {'exp_avg': 'linear'"
    ):
        engine(model, WithAnotherStep(trainable(model)))
    with pytest.raises(UnsupportedOptimizerError, match=r"Lookahead around AdamW.*averages the parameters"):
        engine(model, Lookahead(torch.optim.AdamW(trainable(model))))
    with pytest.raises(UnsupportedOptimizerError, match=r"LBFGS.*curvature"):
        engine(model, torch.optim.LBFGS(trainable(model)))
