"""`scalora export` of folders that a Trainer or `save_pretrained` has written, without a run of `scalora train`."""

import json
import os
import shutil
import signal

import pytest
import torch
from models import tiny_llama, trainable, with_lora
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    Trainer,
    TrainingArguments,
)
from typer.testing import CliRunner

from scalora import ScaLora, ScaLoraCallback, ScaLoraConfig
from scalora.cli import app

TOKENS = torch.randint(5, 60, (6, 12), generator=torch.Generator().manual_seed(0))


def command(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def exported(*words):
    result = command("export", *words)
    assert result.exit_code == 0, result.stderr[-500:]
    return result


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits.float()


def lora(model, task=TaskType.CAUSAL_LM, **settings):
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(**{"r": 2, "target_modules": "all-linear", "task_type": task} | settings))


def save_trained(model, folder, merge="factored", labels=TOKENS, steps=6):
    """Train a few steps with ScaLoRA, save the model, and return its logits."""
    optimizer = torch.optim.AdamW(trainable(model), lr=2e-2)
    ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=2, merge=merge))
    for _ in range(steps):
        model(input_ids=TOKENS, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    live = logits(model)
    model.save_pretrained(folder)
    return live


@pytest.fixture(scope="module")
def trained(causal_folder, tmp_path_factory):
    """Output folders of a Trainer, by the kind of remainder and the dtype of the base, with the trained logits."""
    found = {}

    def make(merge, dtype):
        if (merge, dtype) not in found:
            folder = tmp_path_factory.mktemp("trainer")
            model = lora(AutoModelForCausalLM.from_pretrained(causal_folder, dtype=dtype))
            tokenizer = AutoTokenizer.from_pretrained(causal_folder)
            tokenizer.chat_template = "{% for m in messages %}<<{{ m['content'] }}>>{% endfor %}"
            rows = [{"input_ids": row, "labels": row} for row in TOKENS.tolist()]
            arguments = TrainingArguments(
                str(folder),
                max_steps=6,
                per_device_train_batch_size=3,
                learning_rate=2e-2,
                save_steps=3,
                logging_steps=3,
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
            )
            callback = ScaLoraCallback(ScaLoraConfig(warmup_steps=1, merge=merge))
            trainer = Trainer(model, arguments, train_dataset=rows, processing_class=tokenizer, callbacks=[callback])
            trainer.train()
            found[merge, dtype] = folder, logits(trainer.model)
        return found[merge, dtype]

    return make


@pytest.mark.slow
@pytest.mark.parametrize(("merge", "dtype"), [("dense", "bfloat16"), ("factored", "bfloat16"), ("dense", "float32")])
def test_the_last_checkpoint_of_a_trainer_as_adapter_and_as_model(merge, dtype, trained, causal_folder, tmp_path):
    folder, live = trained(merge, dtype)
    exported(folder, "--output", tmp_path / "adapter")
    exported(folder, "--to", "merged", "--output", tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(causal_folder, dtype=dtype)
    original = logits(base)
    change = (live - original).norm()
    rounding = 1e-3 if dtype == "float32" else 5e-2  # the base computes in its own dtype
    for model in (
        PeftModel.from_pretrained(base, tmp_path / "adapter"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="float32"),
    ):
        assert (logits(model) - live).norm() < rounding * change + rounding / 5 * live.norm()
    for name in ("adapter", "merged"):
        assert "<<" in AutoTokenizer.from_pretrained(tmp_path / name).chat_template
        assert json.loads((tmp_path / name / "export.json").read_text())["state"] == str(folder / "checkpoint-6")


@pytest.mark.slow
def test_a_checkpoint_that_was_cut_off_is_skipped_and_one_can_be_named(trained, causal_folder, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(trained("dense", "float32")[0], folder)
    state = folder / "checkpoint-6" / "scalora_state.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    assert "checkpoint-6' is skipped" in exported(folder, "--output", tmp_path / "adapter").stderr
    assert json.loads((tmp_path / "adapter" / "export.json").read_text())["state"].endswith("checkpoint-3")
    exported(folder / "checkpoint-3", "--base", causal_folder)
    assert (folder / "export-adapter" / "adapter_model.safetensors").is_file()
    (folder / "checkpoint-3" / "trainer_state.json").unlink()
    result = command("export", folder, "--output", tmp_path / "again")
    assert result.exit_code == 2
    assert "checkpoint-3' is skipped" in result.stderr
    assert "no whole checkpoint" in result.stderr


@pytest.mark.slow
def test_what_is_no_state_or_several_is_refused_in_one_line(trained, causal_folder, tmp_path):
    folder, _ = trained("factored", "bfloat16")
    for name in ("first", "second"):
        shutil.copytree(folder, tmp_path / "many" / name)
    (tmp_path / "empty").mkdir()
    other = tmp_path / "other"
    shutil.copytree(causal_folder, other)
    weights = load_file(other / "model.safetensors")
    save_file({k: v + 0.01 for k, v in weights.items()}, other / "model.safetensors", metadata={"format": "pt"})
    for arguments, message in (
        ([tmp_path / "empty"], "holds neither a run's config.yaml nor a scalora_state.safetensors"),
        ([tmp_path / "nowhere"], "does not exist"),
        ([causal_folder / "config.json"], "is not a folder"),
        ([tmp_path / "many"], "give one of 'first', 'second'"),
        ([folder, "--base", other], "belongs to a base model with fingerprint"),
        ([folder, "--base-dtype", "float32"], "belongs to a base model with fingerprint"),
        ([folder, "--base", tmp_path / "gone"], "does not exist"),
        ([folder, "--base-name", tmp_path / "gone"], "neither a hub id nor a folder with a config.json"),
        ([folder, "--to", "merged", "--base-name", "a/b"], "--base-name are for --to adapter"),
    ):
        result = command("export", *arguments, "--output", tmp_path / "out")
        assert result.exit_code == 2, arguments
        (line,) = [line for line in result.stderr.splitlines() if line.startswith("error")]
        assert message in line
        assert not (tmp_path / "out").exists()


def test_evaluate_says_that_a_state_is_no_model(trained, tmp_path):
    folder, _ = trained("factored", "bfloat16")
    # As sft it would be scored on its base.
    (tmp_path / "config.yaml").write_text("model: m\ntask: classification\ndata: {eval: e.jsonl}\n")
    for path in (folder, folder / "checkpoint-6"):
        result = command("evaluate", path, tmp_path / "config.yaml")
        assert result.exit_code == 2
        assert f"`scalora export {path} --to merged`" in result.stderr


@pytest.mark.slow
def test_a_base_that_has_gone_is_asked_for(causal_folder, tmp_path):
    shutil.copytree(causal_folder, tmp_path / "base")
    save_trained(lora(AutoModelForCausalLM.from_pretrained(tmp_path / "base")), tmp_path / "saved")
    (tmp_path / "base").rename(tmp_path / "moved")
    result = command("export", tmp_path / "saved")
    assert result.exit_code == 2
    assert "--base" in result.stderr
    exported(tmp_path / "saved", "--base", tmp_path / "moved")
    config = json.loads((tmp_path / "saved" / "export-adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "moved")


@pytest.mark.slow
def test_somebodys_own_config_file_is_not_taken_for_a_run(trained, tmp_path):
    project = tmp_path / "project"
    shutil.copytree(trained("factored", "bfloat16")[0], project / "out")
    for folder in (project, project / "out"):
        (folder / "config.yaml").write_text("optimizer: {name: adamw}\n")
    exported(project / "out")
    exported(project / "out" / "checkpoint-3", "--output", tmp_path / "checkpoint")


@pytest.mark.slow
def test_a_classifier_keeps_its_head_and_its_classes(encoder_folder, tmp_path):
    names = {0: "red", 1: "blue", 2: "green"}
    settings = {"num_labels": 3, "ignore_mismatched_sizes": True}
    base = AutoModelForSequenceClassification.from_pretrained(encoder_folder, id2label=names, **settings)
    labels = torch.arange(6) % 3
    live = save_trained(lora(base, TaskType.SEQ_CLS), tmp_path / "saved", labels=labels)
    exported(tmp_path / "saved")
    exported(tmp_path / "saved", "--to", "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved" / "export-merged")
    assert merged.config.id2label == names
    torch.testing.assert_close(logits(merged), live, rtol=1e-4, atol=1e-4)
    base = AutoModelForSequenceClassification.from_pretrained(encoder_folder, **settings)
    adapted = PeftModel.from_pretrained(base, tmp_path / "saved" / "export-adapter")
    torch.testing.assert_close(logits(adapted), live, rtol=1e-2, atol=1e-2)


@pytest.mark.slow
def test_a_quantised_base_is_loaded_as_it_was_in_training(tokenizer, tmp_path):
    # bitsandbytes needs at least one quantisation block, 64 inputs, in each row.
    base = tiny_llama(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, pad_token_id=1).bfloat16()
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head", "down_proj"],
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=settings)
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # norms and embeddings in float32
    save_trained(lora(model), tmp_path / "saved")
    exported(tmp_path / "saved")
    exported(tmp_path / "saved", "--to", "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "saved" / "export-merged")
    assert merged.config.to_dict().get("quantization_config") is None


def test_a_model_without_a_class_of_its_own_is_left_to_python(tmp_path):
    model = with_lora(tiny_llama(), r=2, target_modules=["q_proj"])
    save_trained(model, tmp_path / "saved")
    result = command("export", tmp_path / "saved")
    assert result.exit_code == 2
    assert "does not name its base: give the base with --base" in result.stderr


@pytest.mark.slow
def test_a_state_that_does_not_say_how_its_base_was_loaded_takes_it_from_the_options(causal_folder, tmp_path):
    model = lora(AutoModelForCausalLM.from_pretrained(causal_folder, dtype="bfloat16"))
    save_trained(model, tmp_path / "saved")
    forget_loading(tmp_path / "saved" / "scalora_state.safetensors")
    result = command("export", tmp_path / "saved")
    assert result.exit_code == 2
    assert "in the same dtype and quantisation" in result.stderr
    exported(tmp_path / "saved", "--base-dtype", "bfloat16")


def forget_loading(path):
    from scalora.saving.state_file import read_state, write_state

    state = read_state(path)
    del state["loading"]
    content = {key: {k: t.clone() for k, t in v.items()} if key == "tensors" else v for key, v in state.items()}
    write_state(path, content)


@pytest.mark.slow
@pytest.mark.parametrize("writer", ["peft.peft_model.safe_save_file", "scalora.runs.export.write_json"])
def test_a_kill_while_it_writes_leaves_nothing_that_looks_finished(writer, trained, tmp_path, monkeypatch):
    folder, _ = trained("dense", "float32")
    child = os.fork()
    if not child:
        monkeypatch.setattr(writer, lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL))
        command("export", folder, "--output", tmp_path / "out")
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert not (tmp_path / "out").exists()
    exported(folder, "--output", tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_what_is_at_the_output_is_never_replaced(trained, tmp_path, monkeypatch):
    folder, _ = trained("factored", "bfloat16")
    out = tmp_path / "out"
    (tmp_path / "elsewhere").mkdir()
    for make in (out.mkdir, lambda: out.write_text("mine"), lambda: out.symlink_to(tmp_path / "elsewhere")):
        make()
        result = command("export", folder, "--output", out)
        assert result.exit_code == 2
        assert "exists" in result.stderr
        out.rmdir() if out.is_dir() and not out.is_symlink() else out.unlink()

    def appears(*args, **kwargs):
        out.mkdir()
        (out / "mine").write_text("mine")

    monkeypatch.setattr("scalora.runs.export.write_json", appears)
    assert command("export", folder, "--output", out).exit_code == 2
    assert [path.name for path in out.iterdir()] == ["mine"]
