"""Trainers that send what they train to a server that generates: it gets the whole update, or they are refused."""

import queue
import warnings
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from models import TwoLayers, take_random_steps, trainable, with_lora
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from scalora import ChangedBaseError, ScaLora, ScaLoraCallback, ScaLoraConfig
from scalora.integrations.trainer_needs import config_for_trainer

TOKENS = torch.randint(5, 60, (3, 10), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def says(model):
    return model.eval()(input_ids=TOKENS).logits


class Server:
    """In the place of TRL's client of a vLLM server that takes adapters."""

    def __init__(self, max_lora_rank):
        self.max_lora_rank = max_lora_rank
        self.loaded = []

    def get_server_info(self):
        lora = {"max_lora_rank": self.max_lora_rank, "max_loras": 8}
        return {"lora_config": lora, "parallel_config": {"data_parallel_size": 1}}

    def load_lora_adapter(self, name, folder, timeout=0):
        base = AutoModelForCausalLM.from_pretrained(self.base)
        self.loaded.append(says(PeftModel.from_pretrained(base, folder)))

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


class Worker:
    """In the place of what generates rollouts: there are none."""

    def __init__(self):
        self.rollout_buffer, self.metrics_queue = queue.Queue(), queue.Queue()

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


@pytest.fixture
def asynchronous(causal_folder, tmp_path, monkeypatch):
    """Makes TRL's trainer that sends the adapter alone, and its server."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer, async_grpo_trainer

    def make(callbacks=(), max_lora_rank=64):
        server = Server(max_lora_rank)
        server.base = causal_folder
        monkeypatch.setattr(async_grpo_trainer, "VLLMClient", lambda *args: server)
        # For a metric, TRL asks which GPU it is on.
        monkeypatch.setattr(async_grpo_trainer, "get_peak_flops_per_device", lambda *args: 1.0)
        trainer = AsyncGRPOTrainer(
            str(causal_folder), reward_funcs=[lambda **kwargs: []],
            peft_config=LoraConfig(r=2, target_modules=["q_proj", "down_proj"]),
            train_dataset=Dataset.from_list([{"prompt": "say: red"}] * 4),
            processing_class=AutoTokenizer.from_pretrained(causal_folder), rollout_worker=Worker(),
            callbacks=list(callbacks), args=AsyncGRPOConfig(
                output_dir=str(tmp_path / "out"), max_steps=1, report_to="none", bf16=False, use_cpu=True,
                activation_checkpointing=False, token_budget=0,
            ),
        )  # fmt: skip
        return trainer, server

    return make


def test_a_server_that_gets_the_adapter_alone_gets_the_whole_update(asynchronous):
    trainer, server = asynchronous()
    config = config_for_trainer(ScaLoraConfig(warmup_steps=1, remainder_rank=16), trainer, trainer.model)
    assert config.merge == "factored"
    trainer.model.get_base_model().set_attn_implementation("eager")  # its own takes packed tokens only
    optimizer = torch.optim.AdamW(trainable(trainer.model), lr=1e-2)
    engine = ScaLora(trainer.model, optimizer, config)
    take_random_steps(trainer.model, optimizer, 5)
    assert engine.metrics()["scalora/rescales"] == 4
    trainer._sync_weight()
    trained, served = says(trainer.model), server.loaded[0]
    base = AutoModelForCausalLM.from_pretrained(server.base)
    factors_alone = get_peft_model(base, trainer.model.peft_config["default"])
    factors_alone.load_state_dict(dict(trainer.model.named_parameters()), strict=False)
    assert (served - trained).norm() < 0.01 * (says(factors_alone) - trained).norm()


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (ScaLoraConfig(merge="dense"), ChangedBaseError, "sends the adapter alone.* set merge='factored'"),
        (ScaLoraConfig(remainder_rank=32), ValueError, "--max-lora-rank 16, but .* up to 32: start it with 32"),
    ],
)
def test_it_is_refused_before_training_if_it_would_not(config, error, message, asynchronous):
    class Trained(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            raise AssertionError("it trained")

    trainer, server = asynchronous([ScaLoraCallback(config), Trained()], max_lora_rank=16)
    with pytest.raises(error, match=message):
        trainer.train()
    assert not server.loaded


class Of:
    """A trainer with some attributes of ms-swift's or axolotl's."""

    def __init__(self, **attributes):
        self.args = SimpleNamespace(vllm_lora_sync=False)
        vars(self).update({"use_vllm": True, "_sync_peft_weights_no_merge": None} | attributes)


SAVES_ADAPTER = {"_sync_lora_adapter": None, "args": SimpleNamespace(vllm_lora_sync=True)}


@pytest.mark.parametrize(
    ("trainer", "merge"),
    [
        (Of(), "dense"),
        (Of(use_vllm=False), "auto"),
        (Of(**SAVES_ADAPTER), "factored"),
        (SimpleNamespace(rollout_enable_lora=False), "auto"),
        (None, "auto"),
    ],
)
def test_what_axolotl_and_ms_swift_send_decides_where_the_remainder_goes(trainer, merge):
    model = with_lora(TwoLayers(), r=2, target_modules=["first", "second"])
    assert config_for_trainer(ScaLoraConfig(), trainer, model).merge == merge


@pytest.mark.parametrize(
    ("trainer", "merge", "message"),
    [
        (Of(), "factored", "the base weights plus lora_A and lora_B"),
        (Of(ref_model=None), "auto", "the base weights plus lora_A and lora_B"),  # a reference needs factored
        (Of(**SAVES_ADAPTER), "stochastic", "sends the adapter alone"),
        (SimpleNamespace(rollout_enable_lora=True), "dense", "with vllm_enable_lora, ms-swift sends"),
        (SimpleNamespace(rollout_enable_lora=True), "factored", "with vllm_enable_lora, ms-swift sends"),
    ],
)
def test_what_axolotl_and_ms_swift_would_send_without_the_remainder_is_refused(trainer, merge, message):
    model = with_lora(TwoLayers(), r=2, target_modules=["first", "second"])
    with pytest.raises(ChangedBaseError, match=message):
        config_for_trainer(ScaLoraConfig(merge=merge), trainer, model)
