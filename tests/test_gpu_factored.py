"""Factored remainders on a GPU: ``pytest -m gpu``. Skipped where there is none."""

import pytest
import torch
from models import TwoLayers, trainable, with_lora
from torch import nn

from scalora import ScaLora, ScaLoraConfig
from scalora.model.adapters import find_lora_pairs
from scalora.rescale.remainder import FactoredRemainder, compress_full

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def spectra(kind, rows, columns):
    i = torch.arange(columns, dtype=torch.float64)
    values = {
        "slow": 0.99**i,
        "fast": 0.7**i,
        "of low rank": torch.where(i < 10, 1.0, 0.0),
        "clustered": torch.where(i < 60, 3.0, 1 + 1e-3 * i),
        "flat": torch.ones(columns),
        "zero": 0 * i,
    }[kind]
    generator = torch.Generator().manual_seed(0)
    orthonormal, mixing = (
        torch.linalg.qr(torch.randn(size, columns, generator=generator, dtype=torch.float64))[0]
        for size in (rows, columns)
    )
    return (orthonormal * values) @ mixing, values.double()


@pytest.mark.parametrize("kind", ["slow", "fast", "of low rank", "clustered", "flat", "zero"])
def test_a_compression_waits_for_nothing_and_leaves_out_no_more_than_on_the_cpu(kind):
    remainders = {}
    (left, values), (right, _) = spectra(kind, 300, 144), spectra("flat", 200, 144)
    for device in ("cpu", "cuda"):
        remainder = FactoredRemainder(300, 200, 64, 16, dtype=torch.float32, device=torch.device(device))
        remainder.append(left.float().to(device), right.float().to(device))
        remainders[device] = remainder
    compress_full([remainders["cpu"]])
    warm = FactoredRemainder(300, 200, 64, 16, dtype=torch.float32, device=torch.device("cuda"))
    warm.append(left.float().cuda(), right.float().cuda())
    compress_full([warm])  # libraries and workspaces are set up at their first use
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        compress_full([remainders["cuda"]])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    whole = left @ right.T
    errors = {d: (whole - r.dense().double().cpu()).norm() for d, r in remainders.items()}
    least, noise = values.sort(descending=True).values[64:].norm(), 1e-6 * values.norm()
    assert remainders["cuda"].columns == remainders["cpu"].columns == 64
    assert errors["cpu"] <= 1.001 * least + noise
    assert errors["cuda"] <= 1.001 * least + noise
    for remainder in remainders.values():
        torch.testing.assert_close(remainder.discarded.double().cpu().sqrt(), least, rtol=1e-3, atol=float(noise))


def test_steps_with_compressions_wait_for_nothing():
    model = with_lora(TwoLayers(), r=3, target_modules=["first", "second"]).cuda()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, fused=True)
    engine = ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=2, merge="factored", remainder_rank=3))
    x, y = torch.randn(32, 12).cuda(), torch.randn(32, 6).cuda()
    for _ in range(8):
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert engine.pairs[0].remainder.columns == 6
    columns = []
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            with torch.autocast("cuda", torch.bfloat16):
                loss = nn.functional.mse_loss(model(x).float(), y)
            loss.backward()
            engine.optimizer.step()
            engine.optimizer.zero_grad()
            columns.append(engine.pairs[0].remainder.columns)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert columns == [3, 6, 3, 6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True])
def test_one_pass_is_what_two_passes_are(dtype, compiled, monkeypatch):
    torch.manual_seed(0)
    model = with_lora(TwoLayers(64, 96, 48), r=8, target_modules=["first", "second"]).cuda()
    ScaLora(model, torch.optim.AdamW(trainable(model)), ScaLoraConfig(merge="factored", remainder_rank=16))
    for pair in find_lora_pairs(model):
        pair.remainder.append(
            *(0.1 * torch.randn(len(f), 24).to(f) for f in (pair.remainder.left, pair.remainder.right))
        )
    x = torch.randn(4, 50, 64, device="cuda", requires_grad=True)
    plain = model.base_model.model

    def results(run):
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            output = run(x)
        return [output, *torch.autograd.grad(output.float().square().sum(), [x, *trainable(model)])]

    one = results(torch.compile(plain) if compiled else plain)
    monkeypatch.setattr("scalora.model.remainder_forward.can_share", lambda *_: False)
    for found, expected in zip(one, results(plain), strict=True):
        assert found.dtype == expected.dtype or compiled
        assert (found - expected).norm() <= (1e-4 if dtype == torch.float32 else 3e-2) * expected.norm()
