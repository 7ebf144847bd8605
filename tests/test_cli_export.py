"""`scalora export`, through the command: what plain PEFT and Transformers load is what the run has learned."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import WORDS, pairs
from models import tiny_llama
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)
from typer.testing import CliRunner

import scalora
from scalora.cli import app
from scalora.runs.finished_run import FinishedRun

TRAINING = {
    "max_steps": 12,
    "per_device_train_batch_size": 8,
    "logging_steps": 1,
    "learning_rate": 2e-2,
    "gradient_checkpointing": False,
}


ROLES = [("user", "prompt"), ("assistant", "completion")]


def command(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def train(causal_folder, write_jsonl, tmp_path):
    def run(name="run", **settings):
        data = write_jsonl("train.jsonl", pairs(70))
        config = tmp_path / "train.yaml"
        content = {
            "model": str(causal_folder),
            "output_dir": str(tmp_path / name),
            "data": {"train": str(data), "eval": str(data)},
            "training": TRAINING,
        }
        settings["scalora"] = {"warmup_steps": 2} | settings.get("scalora", {})
        config.write_text(yaml.safe_dump(content | settings))
        result = command("train", config)
        assert result.exit_code == 0, result.stderr[-300:]
        return tmp_path / name

    return run


def logits(model):
    tokens = torch.randint(0, 64, (3, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits.float()


def base(folder, **settings):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32", **settings)


@pytest.mark.slow
@pytest.mark.parametrize("merge", ["dense", "factored"])
def test_an_adapter_on_the_untouched_base_is_the_merged_model(merge, train, causal_folder, tmp_path):
    run = train(scalora={"merge": merge})
    assert (run / "adapter").exists() == (merge == "factored")
    merged, original = logits(base(run / "model")), logits(base(causal_folder))
    change = (merged - original).norm()
    result = command("export", run, "--to", "adapter", "--rtol", "1e-4", "--output", tmp_path / "out")
    assert result.exit_code == 0, result.stderr[-300:]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] > 8
    assert not config["use_rslora"]
    assert not config["rank_pattern"]
    assert not config["modules_to_save"]
    loaded = logits(PeftModel.from_pretrained(base(causal_folder), tmp_path / "out"))
    assert (loaded - merged).norm() < 1e-3 * change
    report = json.loads((tmp_path / "out" / "export.json").read_text())
    assert report["error"] <= 1e-4
    assert {layer["rank"] for layer in report["layers"].values()} == {config["r"]}
    assert len(report["layers"]) == 14
    assert report["eval_loss_export"] == pytest.approx(report["eval_loss_run"], rel=1e-3)
    assert report["serving_rank"] >= config["r"]


@pytest.mark.slow
def test_missing_evaluation_data_is_said_before_the_base_is_loaded(train, tmp_path, monkeypatch):
    run = train()
    (tmp_path / "train.jsonl").unlink()
    monkeypatch.setattr(FinishedRun, "load", lambda self: pytest.fail("the base was loaded"))
    result = command("export", run, "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert "train.jsonl' does not exist" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_each_layer_its_own_rank_and_a_cap(train, causal_folder, tmp_path):
    run = train(scalora={"merge": "factored"})
    uniform, own, capped = (tmp_path / name for name in ("uniform", "own", "capped"))
    assert command("export", run, "--output", uniform).exit_code == 0
    assert command("export", run, "--output", own, "--per-layer").exit_code == 0
    assert command("export", run, "--output", capped, "--max-rank", 3, "--dtype", "bfloat16").exit_code == 0
    patterns = json.loads((own / "adapter_config.json").read_text())["rank_pattern"]
    assert len(patterns) == 14
    assert len(set(patterns.values())) > 1
    size = {folder: (folder / "adapter_model.safetensors").stat().st_size for folder in (uniform, own, capped)}
    assert size[capped] < size[own] < size[uniform]
    merged, original = logits(base(run / "model")), logits(base(causal_folder))
    for folder, bound in ((own, 1e-2), (capped, 0.5)):
        loaded = logits(PeftModel.from_pretrained(base(causal_folder), folder))
        assert (loaded - merged).norm() < bound * (merged - original).norm()
    tensors = load_file(capped / "adapter_model.safetensors")
    assert {key: tensor.dtype for key, tensor in tensors.items() if tensor.dtype != torch.bfloat16} == {}
    assert len(tensors) == 28
    assert {min(tensor.shape) for tensor in tensors.values()} == {3}
    report = json.loads((capped / "export.json").read_text())
    assert report["error"] > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("merge", ["dense", "factored"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merged_model_in_any_dtype(merge, dtype, train, tmp_path):
    run = train(scalora={"merge": merge, "mode": "auto"})
    result = command("export", run, "--to", "merged", "--dtype", dtype, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.stderr[-300:]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == getattr(torch, dtype)
    tolerance = {"float32": 1e-4, "bfloat16": 5e-2}[dtype]
    torch.testing.assert_close(logits(model), logits(base(run / "model")), rtol=tolerance, atol=tolerance)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("say")


@pytest.mark.slow
@pytest.mark.parametrize("merge", ["dense", "factored"])
def test_a_delta_continues_exactly(merge, train, causal_folder, tmp_path):
    run = train(scalora={"merge": merge})
    assert command("export", run, "--to", "delta", "--output", tmp_path / "out").exit_code == 0
    model = scalora.load_model(base(causal_folder), tmp_path / "out")
    torch.testing.assert_close(logits(model), logits(base(run / "model")), rtol=1e-4, atol=1e-4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    engine = scalora.ScaLora(model, optimizer, scalora.ScaLoraConfig(warmup_steps=0))
    model.train()
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    assert engine.metrics()["scalora/rescales"] == 1
    assert engine.metrics()["scalora/degenerate_share"] == 0


@pytest.mark.slow
def test_half_precision_bases(train, causal_folder, tmp_path):
    for merge in ("dense", "factored"):
        run = train(merge, dtype="bfloat16", scalora={"merge": merge})
        for to in ("adapter", "merged"):
            result = command("export", run, "--to", to, "--output", tmp_path / f"{merge}-{to}")
            assert result.exit_code == 0, result.stderr[-300:]
        bfloat = AutoModelForCausalLM.from_pretrained(causal_folder, dtype="bfloat16").float()
        original = logits(bfloat)
        adapted = logits(PeftModel.from_pretrained(bfloat, tmp_path / f"{merge}-adapter"))
        merged = logits(base(tmp_path / f"{merge}-merged"))
        # Both are float32 here, so what the base's bfloat16 rounds off in training plays no part.
        assert (adapted - merged).norm() < 5e-3 * (merged - original).norm()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_run_resumes_and_exports_both_ways(kind, train, tokenizer, tmp_path):
    # bitsandbytes needs at least one quantisation block, 64 inputs, in each row.
    tiny_llama(
        vocab_size=len(tokenizer), eos_token_id=2, pad_token_id=1, hidden_size=64, intermediate_size=64
    ).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    # An evaluation in between would make bitsandbytes round the scales of 4-bit weights on a CPU, for good.
    training = TRAINING | {"eval_strategy": "no", "save_strategy": "steps", "save_steps": 4}
    run = train(model=str(tmp_path / "base"), quantization=kind, training=training)
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    (run / "trainer" / "checkpoint-12").rename(tmp_path / "elsewhere")
    resumed = command("train", tmp_path / "train.yaml", "--resume")
    assert resumed.exit_code == 0, resumed.stderr[-300:]
    for name, tensor in load_file(run / "adapter" / "adapter_model.safetensors").items():
        torch.testing.assert_close(tensor, adapter[name], rtol=1e-5, atol=1e-6, msg=name)
    assert not (run / "model").exists()
    losses = [json.loads(line).get("loss") for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [loss for loss in losses if loss is not None]
    assert losses[-1] < losses[0]
    for to in ("adapter", "merged"):
        result = command("export", run, "--to", to, "--output", tmp_path / to)
        assert result.exit_code == 0, result.stderr[-300:]
    assert base(tmp_path / "merged").config.to_dict().get("quantization_config") is None
    losses = []
    for words in ([run], [tmp_path / "merged", "--quantization", "null"]):
        result = command(
            "evaluate", words[0], tmp_path / "train.yaml", *words[1:], "--output", tmp_path / "scores.json"
        )
        assert result.exit_code == 0, result.stderr[-300:]
        losses.append(json.loads((tmp_path / "scores.json").read_text())["loss"])
    # The merged model is not quantised: bitsandbytes rounds what goes into its layers, too.
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


@pytest.mark.slow
def test_a_classifier_keeps_its_trained_head(encoder_folder, write_jsonl, tmp_path):
    rows = [{"text": f" {WORDS[i % 10]} {WORDS[i % 3]}", "label": WORDS[i % 3]} for i in range(40)]
    data = write_jsonl("train.jsonl", rows)
    config = tmp_path / "train.yaml"
    content = {
        "model": str(encoder_folder),
        "task": "classification",
        "output_dir": str(tmp_path / "run"),
        "data": {"train": str(data), "eval": str(data)},
        "training": TRAINING,
    }
    config.write_text(yaml.safe_dump(content))
    assert command("train", config).exit_code == 0
    result = command("export", tmp_path / "run", "--output", tmp_path / "out")
    assert result.exit_code == 0, result.stderr[-300:]
    model = AutoModelForSequenceClassification.from_pretrained(
        encoder_folder, num_labels=3, ignore_mismatched_sizes=True
    )
    loaded = PeftModel.from_pretrained(model, tmp_path / "out")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    torch.testing.assert_close(logits(loaded), logits(merged), rtol=1e-2, atol=1e-3)


@pytest.mark.slow
def test_an_adapter_needs_no_scalora(train, causal_folder, tmp_path):
    run = train(scalora={"merge": "factored"})
    assert command("export", run, "--output", tmp_path / "out").exit_code == 0
    script = (
        "import sys; sys.modules['scalora'] = None\n"
        "import torch; from peft import PeftModel; from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(causal_folder)!r}, dtype='float32')\n"
        f"model = PeftModel.from_pretrained(model, {str(tmp_path / 'out')!r}).eval()\n"
        f"torch.save(model(input_ids=torch.arange(5, 25)[None]).logits.detach(), {str(tmp_path / 'logits.pt')!r})\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    with torch.no_grad():
        live = base(run / "model").eval()(input_ids=torch.arange(5, 25)[None]).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), live, rtol=1e-2, atol=1e-2)


@pytest.mark.slow
def test_an_export_that_is_not_the_run_is_refused_and_removed(train, tmp_path, monkeypatch):
    run = train(scalora={"merge": "factored"})
    write = scalora.saving.ordinary_adapter._save_with_peft

    def corrupted(model, adapter, state, *rest):
        damaged = {key: 1.05 * value if "lora_B" in key else value for key, value in state.items()}
        return write(model, adapter, damaged, *rest)

    monkeypatch.setattr(scalora.saving.ordinary_adapter, "_save_with_peft", corrupted)
    result = command("export", run, "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert "differs from the layer's update" in result.stderr
    assert not (tmp_path / "out").exists()

    def broken(model, adapter, state, *rest):
        return write(model, adapter, {k: v * float("nan") if "lora_B" in k else v for k, v in state.items()}, *rest)

    monkeypatch.setattr(scalora.saving.ordinary_adapter, "_save_with_peft", broken)
    result = command("export", run, "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert "NaN" in result.stderr
    assert not (tmp_path / "out").exists()


TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|user|>{% endfor %}"


@pytest.mark.slow
@pytest.mark.parametrize("merge", ["dense", "factored"])
def test_every_result_has_the_tokenizer_of_the_run(merge, train, causal_folder, write_jsonl, tmp_path):
    chats = [[{"role": role, "content": pair[part]} for role, part in ROLES] for pair in pairs(24)]
    data = str(write_jsonl("chats.jsonl", [{"messages": chat} for chat in chats]))
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    bare = AutoTokenizer.from_pretrained(causal_folder)
    bare.chat_template = None
    base(causal_folder).save_pretrained(tmp_path / "base")
    bare.save_pretrained(tmp_path / "base")
    changes = {"chat_template_path": str(tmp_path / "template.jinja"), "eos_token": "<|user|>"}
    saving = {"save_strategy": "steps", "save_steps": 6}
    run = train(
        model=str(tmp_path / "base"),
        data={"train": data, "eval": data},
        scalora={"merge": merge},
        training=TRAINING | changes | saving,
    )
    for to in ("adapter", "merged", "delta"):
        result = command("export", run, "--to", to)
        assert result.exit_code == 0, result.stderr[-300:]
    result = command("export", run / "trainer" / "checkpoint-6", "--output", tmp_path / "early")
    assert result.exit_code == 0, result.stderr[-300:]
    wanted = GenerationConfig.from_pretrained(run / "model")
    assert wanted.eos_token_id == [bare.convert_tokens_to_ids("<|user|>"), 2]
    adapter = ["adapter"] if merge == "factored" else []
    folders = [run / name for name in ("model", "delta", *adapter, "export-adapter", "export-merged", "export-delta")]
    for folder in (*folders, tmp_path / "early"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert (tokenizer.chat_template, tokenizer.eos_token) == (TEMPLATE, "<|user|>"), folder
        assert GenerationConfig.from_pretrained(folder).to_dict() == wanted.to_dict(), folder
    configs = [AutoConfig.from_pretrained(run / name) for name in ("model", "export-merged")]
    for key in ("eos_token_id", "pad_token_id", "bos_token_id"):
        assert getattr(configs[0], key) == getattr(configs[1], key)


def test_a_chat_template_that_changes_the_embeddings_is_refused(train, causal_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(causal_folder)
    tokenizer.add_tokens(["<|new|>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "chatty")
    with pytest.raises(AssertionError, match="no adapter would hold"):
        train(training=TRAINING | {"chat_template_path": str(tmp_path / "chatty")})


@pytest.mark.slow
def test_a_quantised_classifier_is_loaded_as_in_training(tokenizer, write_jsonl, tmp_path):
    settings = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "pad_token_id": 1}
    tiny_llama(vocab_size=len(tokenizer), **settings).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"text": f" {WORDS[i % 10]} {WORDS[i % 3]}", "label": WORDS[i % 3]} for i in range(24)]
    content = {
        "model": str(tmp_path / "base"),
        "task": "classification",
        "dtype": "bfloat16",
        "quantization": "nf4",
        "output_dir": str(tmp_path / "run"),
        "data": {"train": str(write_jsonl("train.jsonl", rows))},
        "training": TRAINING | {"max_steps": 3},
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(content))
    assert command("train", tmp_path / "train.yaml").exit_code == 0
    for to in ("adapter", "merged"):
        result = command("export", tmp_path / "run", "--to", to)
        assert result.exit_code == 0, result.stderr[-300:]


@pytest.mark.slow
def test_another_base_is_refused(train, causal_folder, tmp_path):
    run = train()
    other = tmp_path / "other"
    model = base(causal_folder)
    model.save_pretrained(other)
    AutoTokenizer.from_pretrained(causal_folder).save_pretrained(other)
    weights = load_file(other / "model.safetensors")
    save_file({k: v * 1.001 for k, v in weights.items()}, other / "model.safetensors", metadata={"format": "pt"})
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"model": str(other)}))
    result = command("export", run)
    assert result.exit_code == 2
    assert "belongs to a base model with fingerprint" in result.stderr
