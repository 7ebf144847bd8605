"""What the plug-ins for axolotl, ms-swift and LLaMA-Factory share, and each with a stub of the framework's interface.

With the frameworks themselves: tests/plugins.
"""

import importlib
import json
import shutil
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from datasets import Dataset
from models import take_random_steps, trainable
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from scalora import BlockSignsCallback, PairAdamW, ScaLora, ScaLoraConfig, load_model
from scalora.integrations.plugin import PluginSettings, leave_an_ordinary_adapter

TOKENS = torch.randint(5, 60, (3, 10), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def says(model):
    return model.eval()(input_ids=TOKENS).logits


@pytest.mark.parametrize(
    ("block", "config", "pair_adamw"),
    [
        (None, ScaLoraConfig(), False),
        ({"interval": 10, "merge": "factored"}, ScaLoraConfig(interval=10, merge="factored"), False),
        ({"optimizer": "pair_adamw"}, ScaLoraConfig(), True),
        ({"mode": "matrix"}, ScaLoraConfig(mode="matrix"), True),
        ({"mode": "matrix", "target_norm": 1.0}, ScaLoraConfig(mode="matrix", target_norm=1.0), False),
    ],
)
def test_a_block_of_settings_is_a_config_and_an_optimizer(block, config, pair_adamw):
    assert PluginSettings.from_block(block) == PluginSettings(config, pair_adamw)


def test_a_block_may_ask_for_block_signs():
    assert PluginSettings.from_block({"method": "block_signs"}) == PluginSettings(None, False)
    block = {"method": "block_signs", "blocks": 4, "optimizer": "pair_adamw"}
    assert PluginSettings.from_block(block) == PluginSettings(None, True, 4)
    assert PluginSettings.from_block({"method": "scalora"}) == PluginSettings(ScaLoraConfig(), False)


@pytest.mark.parametrize(
    ("block", "error"),
    [
        ({"intervall": 10}, "scalora: unknown ScaLoRA setting 'intervall'; the settings are interval, merge, mode"),
        ({"interval": "ten"}, "scalora: interval must be an integer of at least 1, got 'ten'"),
        ({"optimizer": "adamw"}, "scalora.optimizer must be pair_adamw, got 'adamw'"),
        ({"method": "lora"}, "scalora.method must be scalora or block_signs, got 'lora'"),
        ({"method": "block_signs", "interval": 2}, "scalora: 'interval' is no setting of block signs"),
        ({"method": "block_signs", "blocks": 3}, "scalora: blocks must be a power of two above 1, got 3"),
        ({"blocks": 4}, "scalora: unknown ScaLoRA setting 'blocks'"),
        ("dense", "scalora must be a block of settings, such as `scalora: {interval: 10}`, got 'dense'"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(block, error):
    with pytest.raises(ValueError, match="scalora") as raised:
        PluginSettings.from_block(block)
    assert str(raised.value).startswith(error)
    assert "\n" not in str(raised.value)


def test_the_trainer_creates_the_optimizer_of_the_settings(causal_folder, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(causal_folder), LoraConfig(r=2))
    rows = Dataset.from_list([{"input_ids": TOKENS[0].tolist(), "labels": TOKENS[0].tolist()}] * 2)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, use_cpu=True, report_to="none", save_strategy="no", learning_rate=3e-3,
        adam_beta2=0.99, lr_scheduler_type="constant",
    )  # fmt: skip
    settings = PluginSettings.from_block({"mode": "matrix", "warmup_steps": 0})
    callback = settings.callback()
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[callback])
    trainer.train()
    assert isinstance(callback.engine.optimizer, PairAdamW)
    group = callback.engine.optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (3e-3, (0.9, 0.99), 0.0)


def test_the_trainer_trains_block_signs_of_the_settings_and_goes_on_with_them(causal_folder, tmp_path):
    rows = Dataset.from_list([{"input_ids": TOKENS[0].tolist(), "labels": TOKENS[0].tolist()}] * 2)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, use_cpu=True, report_to="none", save_strategy="no", learning_rate=3e-3
    )
    settings = PluginSettings.from_block({"method": "block_signs", "blocks": 4, "optimizer": "pair_adamw"})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(causal_folder), LoraConfig(r=2))
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[settings.callback()])
    trainer.train()
    assert trainer.optimizer.optimizer.__class__ is PairAdamW
    trainer.save_model(tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(causal_folder)
    loaded = PeftModel.from_pretrained(base, tmp_path / "out", is_trainable=True)
    assert loaded.peft_config["default"].r == 8
    Trainer(loaded, arguments, train_dataset=rows, callbacks=[settings.callback()])
    for one, other in zip(trainable(loaded), trainable(model), strict=True):
        assert torch.equal(one, other)


@pytest.fixture
def saved(causal_folder, tmp_path):
    """Saves a trained model; returns its folder and its logits."""

    def save(base_folder=causal_folder, dtype=torch.float32, **config):
        base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=dtype)
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=1, **config))
        take_random_steps(model, optimizer, 5)
        model.save_pretrained(tmp_path / "out")
        return tmp_path / "out", says(model.float())

    return save


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_with_a_merged_update_gets_an_adapter_of_it(dtype, saved, causal_folder):
    folder, trained = saved(dtype=dtype, merge="dense")
    with pytest.raises(KeyError, match="not a PEFT adapter"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(causal_folder), folder)
    leave_an_ordinary_adapter(folder)
    base = AutoModelForCausalLM.from_pretrained(causal_folder, dtype=dtype).float()
    untrained = says(base)
    adapted = says(PeftModel.from_pretrained(base, folder))
    assert (adapted - trained).norm() < 0.01 * (trained - untrained).norm()
    # The state is still there, to go on from.
    state = says(load_model(AutoModelForCausalLM.from_pretrained(causal_folder, dtype=dtype), folder).float())
    assert (state - trained).norm() < 0.01 * (trained - untrained).norm()
    assert not list(folder.glob(".adapter-*"))


def test_a_folder_with_an_adapter_or_without_a_state_is_left_alone(saved, tmp_path):
    folder, _ = saved(merge="factored")
    before = (folder / "adapter_model.safetensors").read_bytes()
    leave_an_ordinary_adapter(folder)
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    leave_an_ordinary_adapter(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_a_base_that_is_gone_is_a_warning_that_says_what_to_do(saved, causal_folder, tmp_path):
    shutil.copytree(causal_folder, tmp_path / "base")
    folder, _ = saved(tmp_path / "base", merge="dense")
    shutil.rmtree(tmp_path / "base")
    with pytest.warns(UserWarning, match=r"state and no adapter: .*`scalora export .*out --to adapter`"):
        leave_an_ordinary_adapter(folder)
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"].startswith("a ScaLoRA state")


@pytest.fixture
def with_stub(monkeypatch):
    """Imports a plug-in with stubs of the modules of its framework."""

    def load(plugin, **modules):
        for name, attributes in modules.items():
            path = name.replace("__", ".")
            stub = ModuleType(path)
            vars(stub).update(attributes)
            monkeypatch.setitem(sys.modules, path, stub)
        name = f"scalora.integrations.{plugin}"
        monkeypatch.delitem(sys.modules, name, raising=False)
        module = importlib.import_module(name)
        monkeypatch.delitem(sys.modules, name)
        return module

    return load


def test_axolotls_plugin_checks_the_config_and_brings_the_callback(with_stub):
    module = with_stub(
        "axolotl", axolotl={}, axolotl__integrations={}, axolotl__integrations__base={"BasePlugin": object}
    )
    plugin = module.ScaloraPlugin()
    assert plugin.get_input_args() == "scalora.integrations.axolotl.ScaloraArgs"
    settings = {"adapter": "qlora", "scalora": {"interval": 3, "mode": "matrix"}}
    plugin.register(settings)
    assert settings["lora_qkv_kernel"] is settings["lora_mlp_kernel"] is settings["lora_o_kernel"] is False
    (callback,) = plugin.add_callbacks_pre_trainer(settings, torch.nn.Identity())
    assert callback.config == ScaLoraConfig(interval=3, mode="matrix")
    (callback,) = plugin.add_callbacks_pre_trainer({"scalora": {"method": "block_signs"}}, torch.nn.Identity())
    assert isinstance(callback, BlockSignsCallback)
    for wrong, error in [
        ({"adapter": None}, "adapter must be lora or qlora with ScaLoRA, got None"),
        ({"relora": True}, "relora: true restarts the adapter"),
        ({"lora_o_kernel": True}, "lora_o_kernel: true computes layers from lora_A and lora_B alone"),
        ({"scalora": {"interval": 0}}, "scalora: interval must be an integer of at least 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=error):
            plugin.register({"adapter": "lora"} | wrong)


def test_ms_swift_gets_the_callback_and_loads_states_before_it_trains_on(with_stub, saved, causal_folder, monkeypatch):
    class Swift:
        @staticmethod
        def from_pretrained(model, folder, **settings):
            return folder, settings

    callbacks = {}
    module = with_stub("swift", swift={}, swift__callbacks={"callbacks_map": callbacks}, swift__tuners={"Swift": Swift})
    with pytest.raises(ValueError, match="scalora: unknown ScaLoRA setting 'intervall'"):
        module.register(intervall=3)
    module.register(interval=3)
    module.register(interval=4)  # a second time: still ms-swift's own function otherwise
    assert callbacks["scalora"](None, None).config == ScaLoraConfig(interval=4)
    module.register(method="block_signs")
    assert isinstance(callbacks["scalora"](None, None), BlockSignsCallback)
    folder, trained = saved(merge="dense")
    base = AutoModelForCausalLM.from_pretrained(causal_folder)
    assert Swift.from_pretrained(base, folder) == (folder, {})  # for inference: the adapter in the folder
    assert Swift.from_pretrained(base, causal_folder, is_trainable=True) == (causal_folder, {"is_trainable": True})
    torch.testing.assert_close(says(Swift.from_pretrained(base, folder, is_trainable=True)), trained)
    monkeypatch.setitem(sys.modules, "unsloth", ModuleType("unsloth"))
    with pytest.raises(ValueError, match="tuner_backend unsloth brings layers of its own"):
        callbacks["scalora"](None, None)


def test_llama_factory_runs_with_the_callback_and_without_the_block(with_stub, saved):
    runs = []
    tuner = SimpleNamespace(run_exp=lambda args, callbacks: runs.append((args, callbacks)))
    module = with_stub(
        "llamafactory", llamafactory={}, llamafactory__hparams={"read_args": lambda args: args},
        llamafactory__train={"tuner": tuner},
    )  # fmt: skip
    folder, _ = saved(merge="dense")
    others = [TrainerCallback()]
    module.run_exp({"output_dir": str(folder), "scalora": {"interval": 3}}, others)
    ((args, (other, callback)),) = runs
    assert (args, [other], callback.config) == ({"output_dir": str(folder)}, others, ScaLoraConfig(interval=3))
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
    for wrong, error in [
        ({"finetuning_type": "full"}, "finetuning_type: full has no LoRA adapter"),
        ({"use_unsloth": True}, "use_unsloth: true brings layers of its own"),
        ({"output_dir": None}, "output_dir is not set"),
        ({"scalora": {"interval": 0}}, "scalora: interval must be"),
    ]:
        with pytest.raises(ValueError, match=error):
            module.run_exp({"output_dir": str(folder)} | wrong)
    assert len(runs) == 1
