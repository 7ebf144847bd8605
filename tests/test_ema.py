"""`ModelEma` averages what the model computes; averages of factors are refused."""

import copy

import pytest
import torch
from models import Mixed, TwoLayers, backward, trainable, with_adapter_in_float32, with_lora
from peft import PeftModel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from scalora import ChangedFactorsError, ModelEma, ScaLora, ScaLoraConfig

KINDS = ["factored", "dense", "dense in bfloat16", "dense_8bit in bfloat16", "stochastic in bfloat16"]
X = torch.randn(9, 12, generator=torch.Generator().manual_seed(5))


def attached(kind="factored", **settings):
    model = with_lora(TwoLayers(), **{"r": 2, "target_modules": ["first", "second"], "lora_alpha": 6} | settings)
    if kind.endswith("bfloat16"):
        model = with_adapter_in_float32(model.bfloat16())
    optimizer = torch.optim.AdamW(trainable(model), lr=2e-2)
    # A rank at which nothing is left out of layers of 16 × 12.
    config = ScaLoraConfig(warmup_steps=1, merge=kind.split(" ")[0], remainder_rank=12)
    return model, optimizer, ScaLora(model, optimizer, config)


def weights(engine):
    """The weight of each layer as float64, from its parts."""
    whole = {}
    for pair in engine.pairs:
        product = pair.scaling * pair.lora_B.detach().double() @ pair.lora_A.detach().double()
        if hasattr(pair.remainder, "exact"):
            whole[pair.name] = product + pair.oriented(pair.remainder.exact(pair.weight).detach().double())
        else:
            whole[pair.name] = product + pair.weight.detach().double() + pair.remainder.dense().double()
    return whole


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_average_of_the_weights_and_training_goes_on_as_without_it(kind):
    plain, without, _ = attached(kind)
    model, optimizer, engine = attached(kind)
    ema, wanted = ModelEma(model, decay=0.8), weights(engine)
    for step in range(12):
        backward(plain, seed=step), backward(model, seed=step)
        without.step(), optimizer.step()
        ema.update()
        wanted = {name: 0.8 * wanted[name] + 0.2 * weight for name, weight in weights(engine).items()}
        if step % 5 == 4:
            with ema.applied():
                model.eval()(X.to(next(model.parameters()).dtype))
            model.train()
    assert engine.metrics()["scalora/rescales"] == 11
    present = weights(engine)
    # What a rounding of the weight to bfloat16 makes of it, where nothing keeps what is rounded off.
    tolerance = {"dense_8bit in bfloat16": 1e-4, "stochastic in bfloat16": 4e-3}.get(kind, 1e-5)
    with ema.applied():
        for name, found in weights(engine).items():
            scale = wanted[name].abs().max()
            assert (found - wanted[name]).abs().max() < tolerance * scale
            assert (found - present[name]).abs().max() > 1e-2 * scale  # the control
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["factored", "dense"])
def test_the_average_is_what_is_evaluated_merged_and_saved(kind, tmp_path):
    model, optimizer, _ = attached(kind)
    ema, merged = ModelEma(model), []
    for step in range(6):
        backward(model, seed=step)
        optimizer.step()
        ema.update(decay=step / (step + 1))  # the mean of all steps
        merged.append(copy.deepcopy(model).merge_and_unload().state_dict())
    mean = TwoLayers()
    mean.load_state_dict({key: sum(of_step[key] for of_step in merged) / 6 for key in merged[0]})
    with torch.no_grad():
        wanted, trained = mean(X), model.eval()(X)
        with ema.applied():
            torch.testing.assert_close(model(X), wanted, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(copy.deepcopy(model).merge_and_unload()(X), wanted, rtol=1e-5, atol=1e-5)
            model.save_pretrained(tmp_path)
            if kind == "factored":
                with model.disable_adapter():
                    assert torch.equal(model(X), TwoLayers()(X))
        assert torch.equal(model(X), trained)
        twin, _, of_twin = attached(kind)
        of_twin.load(tmp_path)
        torch.testing.assert_close(twin.eval()(X), wanted, rtol=1e-5, atol=1e-5)
        if kind == "factored":
            loaded = PeftModel.from_pretrained(TwoLayers(), tmp_path).eval()(X)
            assert (loaded - wanted).norm() < 3e-3 * (wanted - TwoLayers()(X)).norm()


def test_other_trained_parameters_are_averaged_too_and_restored_after_an_error():
    model = with_lora(Mixed(), r=2, target_modules=["embed", "conv1d", "linear"], modules_to_save=["head"])
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=0))
    ema = ModelEma(model, decay=0.5)
    head = model.base_model.model.head.modules_to_save["default"].weight
    tokens, wanted = torch.arange(12).reshape(4, 3), head.detach().clone()
    for _ in range(3):
        model(tokens).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        wanted = 0.5 * wanted + 0.5 * head.detach()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with ema.applied():
        torch.testing.assert_close(head, wanted)
    with pytest.raises(KeyError), ema.applied():
        raise KeyError
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["factored", "dense"])
def test_its_state_dict_restores_it(kind):
    model, optimizer, _ = attached(kind)
    ema = ModelEma(model, decay=0.7)
    for step in range(4):
        backward(model, seed=step)
        optimizer.step()
        ema.update()
    again = ModelEma(model, decay=0.7)
    again.load_state_dict(copy.deepcopy(ema.state_dict()))
    with torch.no_grad():
        trained = model.eval()(X)
        with ema.applied():
            wanted = model(X)
        with again.applied():
            assert torch.equal(model(X), wanted)
    assert not torch.equal(wanted, trained)


@pytest.mark.slow
def test_compressions_leave_out_the_least_of_a_narrow_average():
    model, optimizer, engine = attached()
    ema, wanted = ModelEma(model, decay=0.9, rank=10), weights(engine)
    for step in range(30):
        backward(model, seed=step)
        optimizer.step()
        ema.update()
        wanted = {name: 0.9 * wanted[name] + 0.1 * weight for name, weight in weights(engine).items()}
    with ema.applied():
        for name, found in weights(engine).items():
            assert (found - wanted[name]).norm() < 0.03 * wanted[name].norm()


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"decay": 1.5}, "decay must be from 0 to 1; got 1.5"), ({"rank": 0}, "rank must be at least 1; got 0")],
)
def test_settings_out_of_range_and_models_without_scalora_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        ModelEma(attached()[0], **settings)
    with pytest.raises(ValueError, match=r"call ScaLora\(model, optimizer\) first"):
        ModelEma(with_lora(TwoLayers(), target_modules=["first"]))
    model, *_ = attached()
    ema = ModelEma(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        ema.update()


@pytest.mark.parametrize("kind", ["factored", "dense"])
def test_an_average_of_factors_is_not_saved_either(kind):
    model, optimizer, _ = attached(kind)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7))
    for step in range(4):
        backward(model, seed=step)
        optimizer.step()
        average.update_parameters(model)
    model.state_dict()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7))
    backward(model)
    optimizer.step()
    average.update_parameters(model)
    average.update_parameters(model)
    with pytest.raises(ChangedFactorsError, match="ModelEma"):
        average.module.state_dict()
