"""What the command knows of a run whose weights are split, without starting processes."""

import json
from types import SimpleNamespace

import pytest
import torch
from models import tiny_llama
from transformers.integrations import deepspeed

from scalora.rivals import METHODS
from scalora.runs.errors import InputError
from scalora.runs.prepare import method_of, training_arguments
from scalora.runs.settings import checked_settings
from scalora.runs.sharding import check_sharding, models_are_loaded_whole, splits_weights
from scalora.runs.special_tokens import require_vocabulary
from scalora.saving.checkpoints import set_broken_checkpoints_aside
from scalora.saving.state_file import SHARDED_STATE, STATE_FILE, write_state


def sharded(tmp_path, **content):
    settings = checked_settings({"model": "base", "output_dir": str(tmp_path / "run"), **content})
    method = method_of(settings)
    return settings, method, training_arguments(settings, method, evaluates=False)


@pytest.mark.parametrize(
    ("variables", "splits"),
    [
        ({}, False),
        ({"ACCELERATE_USE_FSDP": "false"}, False),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, True),
    ],
)
def test_the_launcher_may_ask_for_it(variables, splits, tmp_path, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    settings, method, arguments = sharded(tmp_path)
    assert splits_weights(arguments) == splits
    check_sharding(settings, method, arguments)


def test_the_launchers_fsdp_1_is_refused_by_its_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.delenv("FSDP_VERSION", raising=False)
    with pytest.raises(
        InputError, match=r"ACCELERATE_USE_FSDP=true of `accelerate launch` with FSDP_VERSION=1: .* to 2"
    ):
        check_sharding(*sharded(tmp_path))


@pytest.mark.parametrize("stage", [2, 3])
def test_of_deepspeeds_stages_the_third_splits_weights(stage, tmp_path):
    settings, method, arguments = sharded(tmp_path, method="dora")
    arguments.deepspeed_plugin = SimpleNamespace(zero_stage=stage)
    assert splits_weights(arguments) == (stage == 3)
    if stage == 3:
        with pytest.raises(InputError, match=r"method='dora' with DeepSpeed ZeRO-3 of .*: of the methods only scalora"):
            check_sharding(settings, method, arguments)
    else:
        check_sharding(settings, method, arguments)


OF_MATRICES = ("riemannian", "reflora", "reflora_s", "lora_rite", "lora_pro", "relora", "galore", "apollo")


@pytest.mark.parametrize("name", METHODS)
def test_what_is_about_matrices_is_refused_with_the_flat_copies_of_deepspeed(name, tmp_path):
    settings, method, arguments = sharded(tmp_path, method=name, training={"optim": "adamw_torch"})
    arguments.deepspeed_plugin = SimpleNamespace(zero_stage=2)
    if name not in OF_MATRICES:
        check_sharding(settings, method, arguments)
        return
    with pytest.raises(InputError, match=f"method='{name}' with DeepSpeed ZeRO-2 .* flat copies"):
        check_sharding(settings, method, arguments)


@pytest.mark.parametrize("name", ["lora", "block_signs", "scalora"])
def test_pair_adamw_is_refused_with_deepspeed(name, tmp_path):
    content = {"scalora": {"mode": "matrix"}} if name == "scalora" else {"optimizer": "pair_adamw"}
    settings, method, arguments = sharded(tmp_path, method=name, **content)
    arguments.deepspeed_plugin = SimpleNamespace(zero_stage=2)
    with pytest.raises(InputError, match=r"the optimizer PairAdamW with DeepSpeed ZeRO-2 .* training.optim"):
        check_sharding(settings, method, arguments)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("given", ["by the launcher", "in the config"])
def test_with_deepspeed_the_best_model_is_refused_before_it_trains(stage, given, tmp_path):
    settings, method, arguments = sharded(tmp_path, scalora={"mode": "auto"})
    arguments.deepspeed_plugin = SimpleNamespace(zero_stage=stage)
    how = f"DeepSpeed ZeRO-{stage} of `accelerate launch`"
    if given == "in the config":
        settings.training["deepspeed"], how = "zero.json", "training.deepspeed='zero.json'"
    check_sharding(settings, method, arguments)
    arguments.load_best_model_at_end = True
    with pytest.raises(InputError, match=f"training.load_best_model_at_end=True with {how}: .* set it to false"):
        check_sharding(settings, method, arguments)


@pytest.mark.parametrize("by_launcher", [False, True])
def test_a_result_is_made_of_a_base_that_is_loaded_whole(by_launcher, tmp_path):
    *_, arguments = sharded(tmp_path)

    class Config:
        def is_zero3(self):
            return True

    config = Config()
    deepspeed.set_hf_deepspeed_config(config)
    if by_launcher:
        arguments.deepspeed_plugin = SimpleNamespace(dschf=config)
    else:
        arguments.hf_deepspeed_config = config
    try:
        assert deepspeed.is_deepspeed_zero3_enabled()
        with models_are_loaded_whole(arguments):
            assert not deepspeed.is_deepspeed_zero3_enabled()
        assert deepspeed.is_deepspeed_zero3_enabled()
    finally:
        deepspeed.unset_hf_deepspeed_config()


def test_an_embedding_that_zero_3_has_left_empty_has_its_rows():
    model = tiny_llama()
    table = model.get_input_embeddings().weight
    table.ds_shape, table.data = table.shape, torch.empty(0)
    require_vocabulary(model, 64, "template")
    with pytest.raises(InputError, match="from 60 to 64 rows"):
        require_vocabulary(model, 60, "template")


@pytest.mark.parametrize("with_scalora", [False, True])
def test_a_checkpoint_of_shards_without_its_state_is_broken_in_a_run_of_scalora_alone(with_scalora, tmp_path):
    for number in (2, 4):
        checkpoint = tmp_path / f"checkpoint-{number}"
        (checkpoint / "pytorch_model_fsdp_0").mkdir(parents=True)
        (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": number}))
        torch.save({}, checkpoint / "scheduler.pt")
    if with_scalora:
        write_state(tmp_path / "checkpoint-2" / STATE_FILE, {"step": 2})
        said = f"set aside as 'incomplete-checkpoint-4': it has neither {STATE_FILE} nor {SHARDED_STATE}"
        with pytest.warns(UserWarning, match=said):
            set_broken_checkpoints_aside(tmp_path)
    else:
        set_broken_checkpoints_aside(tmp_path)
    last = "incomplete-checkpoint-4" if with_scalora else "checkpoint-4"
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", last}
