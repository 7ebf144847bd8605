"""Several adapters in one model, and trainers whose reference is the model that they train (TRL's DPO and GRPO)."""

import pytest
import torch
from datasets import Dataset
from models import tiny_llama, trainable, with_lora
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from scalora import ChangedBaseError, ScaLora, ScaLoraCallback, ScaLoraConfig, UnsupportedLayerError

TARGETS = ["q_proj", "v_proj", "down_proj"]
TOKENS = torch.randint(5, 60, (3, 10), generator=torch.Generator().manual_seed(0))
SHORT = ScaLoraConfig(warmup_steps=1)


@torch.no_grad()
def says(model, **settings):
    return model.eval()(input_ids=TOKENS, **settings).logits


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5)


def train(model, config, steps=5):
    optimizer = torch.optim.AdamW(trainable(model), lr=2e-2)
    engine = ScaLora(model, optimizer, config)
    for step in range(steps):
        batch = torch.randint(5, 60, (4, 10), generator=torch.Generator().manual_seed(step))
        model.train()(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return engine


def fine_tuned(folder, merge):
    """A model after its first phase, in the process in which the second one begins."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM"))
    train(model, ScaLoraConfig(warmup_steps=1, merge=merge)).detach()
    return model


def settings(cls, tmp_path, **more):
    return cls(
        **{
            "output_dir": str(tmp_path), "per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 1e-2,
            "logging_steps": 1, "save_strategy": "no", "report_to": "none", "bf16": False, "use_cpu": True,
        } | more
    )  # fmt: skip


def dpo(model, folder, tmp_path, callback, **more):
    rows = [{"prompt": "say: red", "chosen": " red", "rejected": " blue"}] * 24
    peft_config = more.pop("peft_config", None)
    return DPOTrainer(
        model, args=settings(DPOConfig, tmp_path, **more), train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder), callbacks=[callback], peft_config=peft_config,
    )  # fmt: skip


def grpo(model, folder, tmp_path, callback, beta=0.1, peft_config=None):
    def longer_words(completions, **kwargs):
        return [float(i % 3) + len(set(text)) for i, text in enumerate(completions)]

    more = {"num_generations": 4, "max_completion_length": 4, "beta": beta}
    prompts = Dataset.from_list([{"prompt": "say: red"}] * 16)
    return GRPOTrainer(
        model, args=settings(GRPOConfig, tmp_path, **more), train_dataset=prompts,
        processing_class=AutoTokenizer.from_pretrained(folder), callbacks=[callback], peft_config=peft_config,
        reward_funcs=longer_words,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("precomputed", [False, True])
def test_from_sft_to_dpo_on_one_adapter_the_reference_is_the_model_that_sft_made(precomputed, causal_folder, tmp_path):
    model = fine_tuned(causal_folder, "factored")
    sft, callback = says(model), ScaLoraCallback(SHORT)
    trainer = dpo(model, causal_folder, tmp_path, callback, precompute_ref_log_probs=precomputed)
    if precomputed:  # in the constructor, from the completed copy
        reference = trainer.train_dataset[0]
        batch = trainer.data_collator([reference])
        with torch.no_grad():
            logits = model.eval()(input_ids=batch["input_ids"][:1], attention_mask=batch["attention_mask"][:1]).logits
        log_probs = logits[:, :-1].log_softmax(-1).gather(2, batch["input_ids"][:1, 1:, None])[..., 0]
        chosen = (log_probs * batch["completion_mask"][:1, 1:]).sum().item()
        assert reference["ref_chosen_logps"] == pytest.approx(chosen, abs=1e-4)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # the policy is its reference
    assert trainer.state.log_history[-2]["scalora/rescales"] == 3
    trained = says(model)
    assert (trained - sft).norm() > 1e-2
    model.set_adapter("ref")
    close(says(model), sft)
    model.set_adapter("default")
    close(says(model), trained)
    model.save_pretrained(tmp_path / "saved")
    base = AutoModelForCausalLM.from_pretrained(causal_folder)
    loaded = PeftModel.from_pretrained(base, tmp_path / "saved" / "ref")
    close(says(loaded), sft)


@pytest.mark.slow
def test_from_sft_to_grpo_on_one_adapter_the_reference_is_the_model_that_sft_made(causal_folder, tmp_path):
    model = fine_tuned(causal_folder, "factored")
    sft, callback = says(model), ScaLoraCallback(SHORT)
    trainer = grpo(model, causal_folder, tmp_path, callback)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "kl" in log]
    assert logs[0]["kl"] == pytest.approx(0.0, abs=1e-5)
    assert logs[-1]["kl"] > 1e-4
    assert logs[-1]["scalora/rescales"] == 3
    model.set_adapter("ref")
    close(says(model), sft)


def new_adapter():
    return LoraConfig(r=2, target_modules=TARGETS)


@pytest.mark.slow
@pytest.mark.parametrize("make", [dpo, grpo])
def test_on_a_float32_base_auto_is_factored_where_the_reference_is_the_model_itself(make, causal_folder, tmp_path):
    model, callback = AutoModelForCausalLM.from_pretrained(causal_folder), ScaLoraCallback(SHORT)
    untouched = says(AutoModelForCausalLM.from_pretrained(causal_folder))
    trainer = make(model, causal_folder, tmp_path, callback, peft_config=new_adapter())
    trainer.train()
    assert {type(pair.remainder).__name__ for pair in callback.engine.pairs} == {"FactoredRemainder"}
    assert callback.engine.state_dict()["rescales"] == 3
    with trainer.model.disable_adapter():
        assert torch.equal(says(trainer.model), untouched)


@pytest.mark.slow
@pytest.mark.parametrize("make", [dpo, grpo])
def test_a_dense_remainder_is_refused_before_training_where_the_reference_is_the_model_itself(
    make, causal_folder, tmp_path
):
    model, callback = AutoModelForCausalLM.from_pretrained(causal_folder), ScaLoraCallback(ScaLoraConfig(merge="dense"))
    trainer = make(model, causal_folder, tmp_path, callback, peft_config=new_adapter())
    with pytest.raises(ChangedBaseError, match=r"merge='dense'.*merge='factored'.*ref_model"):
        trainer.train()
    assert callback.engine is None
    with pytest.raises(ChangedBaseError, match="adding adapter 'ref'"):
        make(fine_tuned(causal_folder, "dense"), causal_folder, tmp_path, ScaLoraCallback(SHORT))


@pytest.mark.slow
def test_without_a_reference_auto_is_dense_on_a_float32_base(causal_folder, tmp_path):
    model, callback = AutoModelForCausalLM.from_pretrained(causal_folder), ScaLoraCallback(SHORT)
    grpo(model, causal_folder, tmp_path, callback, beta=0.0, peft_config=new_adapter()).train()
    assert {type(pair.remainder).__name__ for pair in callback.engine.pairs} == {"DenseRemainder"}
    model, callback = AutoModelForCausalLM.from_pretrained(causal_folder), ScaLoraCallback(SHORT)
    more = {"peft_config": new_adapter(), "precompute_ref_log_probs": True}
    dpo(model, causal_folder, tmp_path, callback, **more).train()
    assert {type(pair.remainder).__name__ for pair in callback.engine.pairs} == {"DenseRemainder"}


def with_second_adapter(tmp_path):
    """A model with an inactive adapter that does something, and a folder with a third one."""
    other = with_lora(tiny_llama(), r=2, target_modules=TARGETS, task_type="CAUSAL_LM", seed=1)
    other.save_pretrained(tmp_path / "second")
    third = with_lora(tiny_llama(), r=2, target_modules=TARGETS, task_type="CAUSAL_LM", seed=2)
    third.save_pretrained(tmp_path / "third")
    model = with_lora(tiny_llama(), r=2, target_modules=TARGETS, random_B=False, task_type="CAUSAL_LM")
    model.load_adapter(tmp_path / "second", "second")
    return model, says(other), says(third)


def test_with_a_factored_remainder_inactive_adapters_are_what_they_were_and_can_be_hot_swapped(tmp_path):
    model, second, third = with_second_adapter(tmp_path)
    train(model, ScaLoraConfig(warmup_steps=1))
    trained, untouched = says(model), says(tiny_llama())
    model.set_adapter("second")
    close(says(model), second)
    hotswap_adapter(model, str(tmp_path / "third"), "second", torch_device="cpu")
    close(says(model), third)
    model.set_adapter("default")
    close(says(model), trained)
    close(says(model, adapter_names=["default", "second", "__base__"])[1:], torch.stack([third[1], untouched[2]]))
    model.add_weighted_adapter(["default", "second"], [1.0, 0.0], "mix", combination_type="cat")
    model.set_adapter("mix")
    close(says(model), trained)


def test_with_a_dense_remainder_inactive_adapters_are_refused_by_name(tmp_path):
    model, *_ = with_second_adapter(tmp_path)
    with pytest.raises(UnsupportedLayerError, match=r"is adapter 'second''s, too.*merge='factored'"):
        train(model, ScaLoraConfig(merge="dense"))
    model.delete_adapter("second")
    train(model, ScaLoraConfig(warmup_steps=1, merge="dense"))
    with pytest.raises(ChangedBaseError, match=r"adding adapter 'second'.*merge='factored'"):
        model.load_adapter(tmp_path / "second", "second")


@pytest.mark.parametrize("kind", ["embedding", "linear"])
def test_a_copy_of_an_adapter_with_its_remainder_is_the_model_at_that_moment(kind):
    targets = ["embed_tokens", "q_proj"] if kind == "embedding" else TARGETS
    model = with_lora(tiny_llama(), r=2, lora_alpha=6, use_rslora=True, target_modules=targets, random_B=False)
    train(model, ScaLoraConfig(warmup_steps=1, merge="factored"))
    before = says(model)
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():  # as TRL does
        if ".ref" in name:
            parameter.data.copy_(model.get_parameter(name.replace(".ref", ".default")))
    model.add_adapter("other", model.peft_config["default"])
    train(model, ScaLoraConfig(warmup_steps=1, merge="factored"))
    assert (says(model) - before).norm() > 1e-2
    model.set_adapter("ref")
    close(says(model), before)
    model.set_adapter("other")
    close(says(model), says(tiny_llama()))
