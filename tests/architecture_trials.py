"""What a user does with a model, on a tiny one: adapts, trains, saves, loads and exports it; the logits must agree."""

import copy
import tempfile
import warnings
from pathlib import Path

import torch
from architectures import tiny
from peft import LoraConfig, PeftModel, get_peft_model

from scalora import (
    PairAdamW,
    ScaLora,
    ScaLoraConfig,
    UnsupportedLayerError,
    add_block_signs,
    export_adapter,
    load_model,
)

R, STEPS = 2, 6

# PEFT refuses some linear layers of Mamba, and with them "all-linear". Those that it takes:
_OF_MAMBA = ["in_proj", "x_proj", "q_proj", "v_proj", "up_proj", "down_proj"]


class PlainPeftFailsError(Exception):
    """PEFT without scalora does not train an architecture, or does not load what it has saved of it."""


def tried_by_peft(kind, head):
    """The tiny model, its batch, and the modules to adapt; raises `PlainPeftFailsError`."""
    try:
        base, batch = tiny(kind, head)
        targets = "all-linear"
        try:
            model = adapted(base, targets)
        except ValueError:
            targets = _OF_MAMBA
            model = adapted(base, targets)
        model(**batch).loss.backward()
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape, generator=generator) / 10
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            agree(logits(PeftModel.from_pretrained(copy.deepcopy(base), folder), batch), logits(model, batch), 1e-6)
    except Exception as error:
        raise PlainPeftFailsError(f"{type(error).__name__}: {error}") from error
    return base, batch, targets


def adapted(base, targets):
    torch.manual_seed(1)
    config = LoraConfig(r=R, lora_alpha=R, target_modules=targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, about tied weights and layers that are stored transposed
        return get_peft_model(copy.deepcopy(base), config)


def logits(model, batch):
    model.eval()
    with torch.no_grad():
        output = model(**batch)
    return output.logits if hasattr(output, "logits") else output[1]


def loss_of(model, batch):
    model.eval()  # without dropout
    with torch.no_grad():
        return float(model(**batch).loss)


def agree(found, expected, tolerance):
    error = float((found - expected).norm() / expected.norm())
    assert error <= tolerance, f"relative error {error:.1e}"


def trained_and_shipped(base, batch, targets, merge):
    """Try all that is to be done with a model; returns ScaLoRA's refusal, or None if all of it is right."""
    model = adapted(base, targets)
    factors = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=2e-3, weight_decay=0)
    try:
        engine = ScaLora(model, optimizer, ScaLoraConfig(merge=merge, warmup_steps=0, interval=1))
    except UnsupportedLayerError as error:
        return str(error)
    loss_before = loss_of(model, batch)
    for step in range(STEPS):
        model.train()
        optimizer.zero_grad()
        model(**batch).loss.backward()
        if step < STEPS - 1:
            optimizer.step()
    assert loss_of(model, batch) < loss_before, "training has not lowered the loss"

    # A step of rate zero is nothing but a rescale.
    before, factors_before = logits(model, batch), [p.detach().clone() for p in factors]
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert engine.metrics()["scalora/left_alone_share"] < 1
    assert not all(map(torch.equal, factors_before, factors))
    trained = logits(model, batch)
    agree(trained, before, 1e-5)

    with tempfile.TemporaryDirectory() as folder:
        state, adapter = Path(folder, "state"), Path(folder, "adapter")
        model.save_pretrained(state)
        agree(logits(load_model(copy.deepcopy(base), state), batch), trained, 1e-6)
        _, report = export_adapter(copy.deepcopy(base), state, adapter, rtol=1e-5)
        assert max(report.needed.values()) > R
        agree(logits(PeftModel.from_pretrained(copy.deepcopy(base), adapter), batch), trained, 1e-4)
    return None


def trained_and_shipped_with_block_signs(base, batch, targets):
    """Try all that is to be done with block signs on a model."""
    model = adapted(base, targets)
    add_block_signs(model, 4)
    optimizer, loss_before = PairAdamW(model, lr=2e-3), loss_of(model, batch)
    for _ in range(STEPS):
        model.train()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss_of(model, batch) < loss_before, "training has not lowered the loss"
    trained = logits(model, batch)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder)
        assert max(parameter.shape[1] for name, parameter in loaded.named_parameters() if "lora_B" in name) > R
        agree(logits(loaded, batch), trained, 1e-4)
        resumed = adapted(base, targets)
        add_block_signs(resumed, 4)
        resumed.load_adapter(folder, "default", is_trainable=True)
        agree(logits(resumed, batch), trained, 1e-6)
    agree(logits(model.merge_and_unload(), batch), trained, 1e-4)
