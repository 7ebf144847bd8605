"""Replays of rescales and of PairAdamW's steps: what is recorded once does what is called each time, to the bit.

CUDA graphs themselves are in tests/test_gpu.py.
"""

import copy

import pytest
import torch
from models import TwoLayers, tiny_llama, trainable, with_lora
from peft import LoraConfig, get_peft_model
from recorder import Recordings
from torch import nn

from scalora import PairAdamW, ScaLora, ScaLoraConfig
from scalora.maths.scaling import scaling_of_grams
from scalora.rescale.replay import launched_one_by_one


@pytest.fixture
def recordings(monkeypatch):
    return Recordings(monkeypatch)


def adamw(model):
    return torch.optim.AdamW(trainable(model), lr=1e-2, foreach=True)


def sgd(model):
    return torch.optim.SGD(trainable(model), lr=1e-2, momentum=0.9)


def pair_adamw(model):
    groups = [[p for name, p in model.named_parameters() if key in name] for key in ("lora_A", "lora_B")]
    return PairAdamW(model, [{"params": groups[0]}, {"params": groups[1], "lr": 2e-2}], lr=1e-2)


class Run:
    """A run on gradients that are given, at other addresses in each step, with a rate that changes."""

    def __init__(self, make_optimizer=adamw, *, dtype=torch.float32, r=3, **settings):
        torch.manual_seed(0)
        self.model = get_peft_model(TwoLayers().to(dtype), LoraConfig(r=r, target_modules=["first", "second"]))
        self.optimizer = make_optimizer(self.model)
        self.engine = ScaLora(self.model, self.optimizer, ScaLoraConfig(**{"warmup_steps": 1} | settings))
        self.generator = torch.Generator().manual_seed(1)
        self.kept = []

    def steps(self, count, without=()):
        for _ in range(count):
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    gradient = torch.randn(parameter.shape, generator=self.generator)
                    parameter.grad = None if any(part in name for part in without) else gradient
                    self.kept.append(parameter.grad)  # so that its memory is not used again
            self.optimizer.step()
            for group in self.optimizer.param_groups:
                group["lr"] *= 0.9
        return self

    @property
    def tensors(self):
        state = self.engine.state_dict()
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        of_optimizer = {
            f"{number} {key}": value
            for number, entries in self.optimizer.state_dict()["state"].items()
            for key, value in entries.items()
        }
        return state["tensors"] | gradients | of_optimizer | self.engine.metrics()


def assert_equal(one, other):
    found, wanted = one.tensors, other.tensors
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(torch.as_tensor(found[key]), torch.as_tensor(value)), key


MATRICES = {"mode": "matrix", "target_norm": 0.5}

CASES = [
    ("auto", adamw),
    ("scalar", adamw),
    ("auto", sgd),
    ("auto", pair_adamw),
    ("matrix", pair_adamw),
]


@pytest.mark.parametrize(("mode", "make_optimizer"), CASES)
@pytest.mark.parametrize(
    ("dtype", "merge"),
    [
        (torch.float32, "dense"),
        (torch.bfloat16, "dense"),
        (torch.float16, "dense_8bit"),
        (torch.bfloat16, "stochastic"),
    ],
)
def test_a_run_with_replays_ends_as_one_without(dtype, merge, mode, make_optimizer, recordings):
    settings = {"dtype": dtype, "merge": merge, "mode": mode}
    found = Run(make_optimizer, **settings).steps(12)
    in_pairs = make_optimizer is pair_adamw
    # Of 11 rescales, and of 12 steps, the first two are not replayed. PairAdamW has its state before the first.
    assert (recordings.recorded, recordings.launched) == ((2, 9 + 10) if in_pairs else (1, 9))
    with launched_one_by_one():
        wanted = Run(make_optimizer, **settings).steps(12)
    assert recordings.recorded == 1 + in_pairs
    assert_equal(found, wanted)
    assert found.engine.metrics()["scalora/left_alone_share"] < 1


@pytest.mark.parametrize(("mode", "make_optimizer"), CASES)
def test_a_factored_remainder_has_a_recording_for_each_place_that_it_fills(mode, make_optimizer, recordings):
    """It fills the columns 4 to 6 and 7 to 9 again and again: of 9 a compression leaves 3."""
    settings = {"mode": mode, "merge": "factored", "remainder_rank": 3}
    found = Run(make_optimizer, **settings).steps(14)
    # Of 13 rescales, the first fills the columns 1 to 3; the two others are recorded when they come for the third time.
    of_steps = make_optimizer is pair_adamw
    assert (recordings.recorded, recordings.launched) == (2 + of_steps, 8 + 12 * of_steps)
    with launched_one_by_one():
        wanted = Run(make_optimizer, **settings).steps(14)
    assert_equal(found, wanted)
    assert found.engine.pairs[0].remainder.columns == wanted.engine.pairs[0].remainder.columns


@pytest.mark.parametrize(("mode", "make_optimizer"), CASES)
def test_what_moves_in_memory_is_recorded_anew(mode, make_optimizer, recordings):
    def run():
        run = Run(make_optimizer, mode=mode).steps(6)
        state = copy.deepcopy(run.engine.state_dict())
        run.steps(2).engine.load_state_dict(state)
        run.steps(5)
        weight = run.engine.pairs[0].weight
        weight.data = weight.data.clone()
        return run.steps(5)

    found = run()
    assert recordings.recorded >= 3
    with launched_one_by_one():
        assert_equal(found, run())


@pytest.mark.parametrize(("mode", "make_optimizer"), CASES)
def test_layers_may_be_without_gradients(mode, make_optimizer, recordings):
    def run():
        run = Run(make_optimizer, mode=mode).steps(4)
        for _ in range(2):
            run.steps(1, without=["first"]).steps(4).steps(4, without=["first"])
        return run

    found = run()
    assert recordings.launched >= 5
    with launched_one_by_one():
        assert_equal(found, run())


@pytest.mark.parametrize(("kind", "settings"), [(torch.optim.AdamW, {}), (torch.optim.SGD, MATRICES)])
def test_only_the_device_knows_of_steps_that_are_skipped(kind, settings, recordings):
    """As with GradScaler, which asks fused optimizers to skip them."""

    def run():
        run = Run(lambda model: kind(trainable(model), lr=1e-2, fused=True), **settings)
        for skipped in [0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0]:
            run.optimizer.found_inf = torch.tensor(skipped)
            run.steps(1)
        return run

    found = run()
    assert found.engine.metrics()["scalora/rescales"] == 5
    assert recordings.launched
    with launched_one_by_one():
        assert_equal(found, run())


def test_a_rescale_that_differs_each_time_is_not_replayed(recordings):
    Run(sgd, **MATRICES, optimum="exact").steps(6)
    assert not recordings.recorded


def test_places_that_come_back_too_seldom_are_not_recorded(recordings, monkeypatch):
    monkeypatch.setattr("scalora.rescale.replay._MOST_VARIANTS", 1)
    found = Run(merge="factored", remainder_rank=3).steps(14)
    assert recordings.recorded == 1
    with launched_one_by_one():
        assert_equal(found, Run(merge="factored", remainder_rank=3).steps(14))


def test_a_recording_is_freed_when_the_engine_is_detached(recordings):
    run = Run().steps(5)
    assert recordings.kept() is not None
    run.engine.detach()
    assert recordings.kept() is None
    assert run.engine.metrics()["scalora/rescales"] == 4


def test_rules_of_others_are_not_replayed(recordings):
    model = with_lora(TwoLayers(), r=3, target_modules=["first", "second"])
    optimizer = sgd(model)
    ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=1), scaling_rule=scaling_of_grams)
    for _ in range(6):
        for parameter in trainable(model):
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    assert not recordings.recorded


def test_what_cannot_be_recorded_is_called_each_time_and_a_warning_says_why(recordings, monkeypatch):
    def fails(function, device, memory):
        raise RuntimeError("CUDA error: operation not permitted\nand more")

    monkeypatch.setattr("scalora.rescale.replay.record", fails)
    with pytest.warns(
        UserWarning, match=r"a rescale takes longer .*\(RuntimeError: CUDA error: operation not permitted\)"
    ):
        found = Run().steps(8)
    with launched_one_by_one():
        assert_equal(found, Run().steps(8))


@pytest.mark.filterwarnings("error:.*takes longer")
def test_what_would_keep_too_much_memory_is_called_each_time(recordings, monkeypatch):
    monkeypatch.setattr("scalora.rescale.replay.record", lambda function, device, memory: None)
    found = Run(pair_adamw, mode="matrix").steps(8)
    with launched_one_by_one():
        assert_equal(found, Run(pair_adamw, mode="matrix").steps(8))


def test_a_language_model_trains_as_without_replays(recordings):
    def train():
        model = with_lora(tiny_llama(num_hidden_layers=2), r=4, target_modules="all-linear")
        optimizer = PairAdamW(model, lr=1e-3)
        ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=1, mode="matrix"))
        tokens = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))
        losses = []
        for _ in range(8):
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    found = train()
    assert recordings.launched == 5 + 6
    with launched_one_by_one():
        assert found == train()


def test_a_backward_pass_notices_that_a_replay_has_changed_what_it_needs(recordings):
    run = Run().steps(5)
    with torch.enable_grad():
        loss = nn.functional.mse_loss(run.model(torch.randn(4, 12)), torch.zeros(4, 6))
    run.steps(1)
    assert recordings.launched
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
