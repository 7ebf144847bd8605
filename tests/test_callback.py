"""`ScaLoraCallback` in `transformers.Trainer` and TRL's trainers."""

import warnings

import pytest
import torch
from datasets import Dataset
from models import tiny_llama, with_lora
from peft import LoraConfig, PeftModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from scalora import ChangedBaseError, ScaLora, ScaLoraCallback, ScaLoraConfig


def tokens(count=16):
    ids = torch.randint(0, 64, (count, 8), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_list([{"input_ids": row, "labels": row, "attention_mask": [1] * 8} for row in ids])


def arguments(tmp_path, cls=TrainingArguments, **settings):
    defaults = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "dataloader_pin_memory": False,
    }
    return cls(**defaults | settings)


@pytest.mark.slow
def test_metrics_reach_the_history_and_the_reporters(tmp_path):
    model = with_lora(tiny_llama(), r=2, target_modules="all-linear", random_B=False)
    args = arguments(tmp_path, report_to="tensorboard", gradient_accumulation_steps=2, eval_strategy="epoch")
    args.logging_dir = str(tmp_path / "board")
    callback = ScaLoraCallback(ScaLoraConfig(warmup_steps=2))
    trainer = Trainer(model, args, train_dataset=tokens(), eval_dataset=tokens(4), callbacks=[callback])
    trainer.train()
    assert callback.engine.metrics()["scalora/rescales"] == 4
    logged = [log for log in trainer.state.log_history if "loss" in log]
    assert ["scalora/column_share" in log for log in logged] == [False, False, True, True, True, True]
    (file,) = tmp_path.rglob("events.out.tfevents*")
    board = EventAccumulator(str(file)).Reload()
    series = {tag: [event.value for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}
    (tag,) = (tag for tag in series if tag.endswith("scalora/column_share"))
    assert series[tag] == pytest.approx([log["scalora/column_share"] for log in logged[2:]])


@pytest.mark.slow
def test_a_trainer_gives_the_weights_of_a_loop_with_the_engine(tmp_path):
    data, config = tokens(24), ScaLoraConfig(warmup_steps=1, interval=2)
    model, twin = (with_lora(tiny_llama(), r=2, target_modules="all-linear") for _ in range(2))
    args = arguments(tmp_path, train_sampling_strategy="sequential", max_grad_norm=0.5, lr_scheduler_type="constant")
    Trainer(model, args, train_dataset=data, callbacks=[ScaLoraCallback(config)]).train()
    trained = [p for p in twin.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    ScaLora(twin, optimizer, config)
    ids = torch.tensor(data["input_ids"])
    for batch in ids.split(4):
        twin(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.5)
        optimizer.step()
        optimizer.zero_grad()
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
def test_sft_trainer_with_its_own_peft_config(causal_folder, tmp_path):
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(causal_folder),
        args=arguments(tmp_path, SFTConfig),
        train_dataset=Dataset.from_dict({"text": ["say: red blue", "say: green"] * 12}),
        processing_class=AutoTokenizer.from_pretrained(causal_folder),
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
        callbacks=[ScaLoraCallback(ScaLoraConfig(warmup_steps=2))],
    )
    trainer.train()
    assert trainer.state.log_history[-2]["scalora/rescales"] == 4
    trainer.save_model()
    assert {path.name for path in tmp_path.glob("*.safetensors")} >= {"scalora_state.safetensors"}
    with pytest.raises(KeyError, match=r"README\.md"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(causal_folder), tmp_path)


def preferences():
    return Dataset.from_list([{"prompt": "say: red", "chosen": " red", "rejected": " blue"}] * 24)


@pytest.fixture
def dpo(causal_folder, tmp_path):
    def trainer(merge, **settings):
        arguments_ = settings.pop("arguments", {})
        return DPOTrainer(
            AutoModelForCausalLM.from_pretrained(causal_folder),
            args=arguments(tmp_path, DPOConfig, **arguments_),
            train_dataset=preferences(),
            processing_class=AutoTokenizer.from_pretrained(causal_folder),
            callbacks=[ScaLoraCallback(ScaLoraConfig(warmup_steps=2, merge=merge))],
            peft_config=LoraConfig(r=2, target_modules="all-linear"),
            **settings,
        )

    return trainer


@pytest.mark.slow
def test_dpo_with_a_dense_remainder_takes_a_reference_model_or_is_refused(dpo, causal_folder):
    separate = dpo("dense", ref_model=AutoModelForCausalLM.from_pretrained(causal_folder))
    separate.train()
    losses = [log["loss"] for log in separate.state.log_history if "loss" in log]
    assert losses[-1] < losses[0]
    assert separate.state.log_history[-2]["scalora/rescales"] == 4
    with pytest.raises(ChangedBaseError, match="ref_model"):
        dpo("dense").train()


@pytest.mark.slow
def test_dpo_with_a_factored_remainder_has_the_untouched_model_as_its_reference(dpo, causal_folder):
    trainer = dpo("factored", arguments={"max_steps": 52})
    trainer.train()
    assert trainer.state.log_history[-2]["scalora/rescales"] == 50
    untouched = AutoModelForCausalLM.from_pretrained(causal_folder)
    ids = torch.randint(5, 60, (4, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with trainer.model.disable_adapter():
            reference = trainer.model.eval()(input_ids=ids).logits.log_softmax(-1)
        assert torch.equal(reference, untouched.eval()(input_ids=ids).logits.log_softmax(-1))
        assert not torch.equal(trainer.model(input_ids=ids).logits.log_softmax(-1), reference)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "first"),
    [({"warmup_steps": 6}, 7), ({"warmup_steps": 2, "interval": 5}, 7), ({"warmup_steps": 5}, None)],
)
def test_a_run_too_short_to_rescale_is_said_when_it_begins(settings, first, tmp_path):
    model = with_lora(tiny_llama(), r=2, target_modules="all-linear")
    callbacks = [ScaLoraCallback(ScaLoraConfig(**settings))]
    trainer = Trainer(model, arguments(tmp_path), train_dataset=tokens(), callbacks=callbacks)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.train()
    texts = [str(warning.message) for warning in said if "never rescales" in str(warning.message)]
    assert len(texts) == (first is not None)
    assert all("this run of 6 steps never rescales, so it is plain LoRA: with warmup_steps=" in text for text in texts)
    assert all(f"the first rescale is at step {first};" in text for text in texts)


@pytest.mark.slow
def test_training_twice_attaches_once_each_time(tmp_path):
    model = with_lora(tiny_llama(), r=2, target_modules="all-linear")
    callback = ScaLoraCallback(ScaLoraConfig(warmup_steps=0))
    trainer = Trainer(model, arguments(tmp_path), train_dataset=tokens(), callbacks=[callback])
    for _ in range(2):
        trainer.train()
        assert callback.engine.metrics()["scalora/rescales"] == 6
