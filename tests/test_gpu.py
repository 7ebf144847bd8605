"""What only a GPU shows: ``pytest -m gpu``. Skipped where there is none."""

import pytest
import torch
from models import TwoLayers, trainable, with_lora
from torch import nn

from scalora import ScaLora, ScaLoraConfig
from scalora.model.adapters import find_lora_pairs
from scalora.rescale.remainder import DenseRemainder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

OPTIMIZERS = {
    "AdamW": (torch.optim.AdamW, {}),
    "fused AdamW": (torch.optim.AdamW, {"fused": True}),
    "SGD with momentum": (torch.optim.SGD, {"momentum": 0.9}),
}


def train(device, dtype, merge, optimizer="fused AdamW", steps=30):
    torch.manual_seed(0)
    model = with_lora(TwoLayers(), dtype=dtype, r=3, target_modules=["first", "second"]).to(device)
    cls, settings = OPTIMIZERS[optimizer]
    engine = ScaLora(model, cls(trainable(model), lr=1e-2, **settings), ScaLoraConfig(warmup_steps=2, merge=merge))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 12, generator=generator, dtype=dtype).to(device)
    y = torch.randn(32, 6, generator=generator, dtype=dtype).to(device)
    for _ in range(steps):
        nn.functional.mse_loss(model(x), y).backward()
        engine.optimizer.step()
        engine.optimizer.zero_grad()
    return model, engine, (x, y)


def effective_weights(model):
    for pair in find_lora_pairs(model):
        dense = isinstance(pair.remainder, DenseRemainder)
        merged = pair.oriented(pair.weight) if dense else pair.oriented(pair.weight) + pair.remainder.dense()
        yield (merged.double() + pair.scaling * pair.lora_B.double() @ pair.lora_A.double()).detach().cpu()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("merge", ["dense", "factored"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_training_is_that_of_the_cpu(dtype, bound, merge, optimizer):
    of_cpu, *_ = train("cpu", dtype, merge, optimizer)
    of_gpu, engine, _ = train("cuda", dtype, merge, optimizer)
    assert engine.metrics()["scalora/rescales"] == 28
    assert engine.metrics()["scalora/column_share"] > 0
    for expected, found in zip(effective_weights(of_cpu), effective_weights(of_gpu), strict=True):
        assert (found - expected).norm() < bound * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_merges_do_not_drift(dtype):
    torch.manual_seed(0)
    weight = torch.randn(512, 768).to(dtype).cuda()
    left, right = 1e-3 * torch.randn(512, 8).cuda(), torch.randn(768, 8).cuda()
    remainder, exact = DenseRemainder(weight, transposed=False), weight.double()
    for _ in range(50):
        remainder.add(weight, left, right)
        exact += left.double() @ right.double().mT
    assert (remainder.exact(weight).double() - exact).norm() < 1e-5 * exact.norm()
    rounded_off = (remainder.exact(weight) - weight.float()).abs()
    assert (rounded_off <= torch.finfo(dtype).eps * weight.float().abs() + torch.finfo(dtype).smallest_normal).all()


@pytest.mark.parametrize("merge", ["dense", "factored"])
def test_a_step_with_a_rescale_waits_for_nothing(merge):
    model, engine, (x, y) = train("cuda", torch.float32, merge, steps=5)
    nn.functional.mse_loss(model(x), y).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert engine.metrics()["scalora/rescales"] == 4


def test_a_step_that_the_grad_scaler_skips_does_not_count():
    model, engine, (x, y) = train("cuda", torch.float32, "dense", steps=3)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    counts = []
    for spoilt in (False, True, False):
        with torch.autocast("cuda", torch.float16):
            loss = nn.functional.mse_loss(model(x).float(), y)
        scaler.scale(loss).backward()
        if spoilt:
            model.base_model.model.first.lora_A["default"].weight.grad[0, 0] = torch.inf
        scaler.step(engine.optimizer)
        scaler.update()
        engine.optimizer.zero_grad()
        counts.append(engine.metrics()["scalora/rescales"])
    assert counts == [2, 2, 3]
