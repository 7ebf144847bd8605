"""What `scalora train` shows: few lines, one progress display, warnings that matter once, and a summary at the end."""

import json
import logging
import math
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
import warnings

import pytest
import yaml
from conftest import pairs
from rich.filesize import decimal
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from scalora.cli import app
from scalora.runs import train as training
from scalora.runs.errors import InputError
from scalora.runs.messages import only_relevant_messages

TRAINING = {"max_steps": 10, "per_device_train_batch_size": 4, "logging_steps": 1, "learning_rate": 1e-2}


def scalora(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def trained(*words):
    result = scalora("train", *words)
    assert result.exit_code == 0, result.output
    return result


def warnings_in(text):
    return [line for line in text.splitlines() if "arning" in line]


def rows(text):
    """The labelled lines of a summary: what is before and after the gap between them."""
    found = (re.fullmatch(r"(\S.*?)  +(\S.*)", line) for line in text.splitlines())
    return {match[1]: match[2] for match in found if match}


def next_commands(text):
    return text.partition("\nnext:\n")[2].splitlines()


@pytest.fixture
def write_config(causal_folder, write_jsonl, tmp_path):
    def write(**settings):
        data = {"train": str(write_jsonl("train.jsonl", pairs(24))), "eval": str(write_jsonl("eval.jsonl", pairs(8)))}
        content = {"model": str(causal_folder), "output_dir": str(tmp_path / "run"), "scalora": {"warmup_steps": 1}}
        content |= settings | {
            "data": data | settings.get("data", {}),
            "training": TRAINING | settings.get("training", {}),
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


def on_a_terminal(*command):
    """What a command writes to a terminal of 100 columns."""
    ours, its = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(command, stdin=its, stdout=its, stderr=its, env=environment) as process:
        os.close(its)
        chunks = []
        while True:
            try:
                chunks.append(os.read(ours, 1 << 16))
            except OSError:  # the other end is closed
                break
    os.close(ours)
    output = b"".join(chunks).decode()
    assert process.returncode == 0, output
    return output


@pytest.mark.slow
def test_ten_steps_take_less_than_forty_lines(write_config):
    done = subprocess.run(
        [sys.executable, "-m", "scalora", "train", str(write_config())],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert len(lines) < 40
    logged = [line for line in lines if line.startswith("step ")]
    steps = [line for line in logged if "  loss " in line]
    evaluations = [line for line in logged if "  eval loss " in line]
    assert (len(steps), len(evaluations)) == (10, 2)
    for step, line in enumerate(steps, start=1):
        assert re.match(rf"step {step:>2}/10  loss \d\.\d{{4}}  lr 0\.\d+", line)
        assert ("  scaled by matrix 100%" in line) == (step > 1)
        assert line.endswith(" left") == (step < 10)
    assert re.fullmatch(r"step  6/10  eval loss \d\.\d{4}  0:\d\d:\d\d left", evaluations[0])
    assert re.fullmatch(r"step 10/10  eval loss \d\.\d{4}", evaluations[1])
    for noise in ("{", "\r", "arning", "kernels", "it/s", "examples/s", "shards"):
        assert noise not in done.stdout


@pytest.mark.slow
def test_a_terminal_has_one_progress_display_at_a_time(write_config):
    config = write_config(training={"eval_strategy": "steps", "eval_steps": 5})
    output = on_a_terminal(sys.executable, "-m", "scalora", "train", str(config))
    assert "\x1b[1A" not in output  # what a display of more than one line needs
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output)
    frames = [frame for frame in re.split(r"[\r\n]+", plain) if "━" in frame]
    kinds = {frame.split()[0] for frame in frames}
    assert kinds == {"training", "evaluating"}
    assert all(frame.endswith(" left") and frame.count("left") == 1 for frame in frames)
    # Dashes until a time can be estimated, which takes longer than steps that take no time.
    assert re.search(r"training [━╸╺]+ +[1-9]/10 (\d+:\d\d:\d\d|-:--:--) left", plain)
    lines = [line for line in re.split(r"[\r\n]+", plain) if line.startswith("step")]
    assert len(lines) == 12
    assert not any("left" in line for line in lines)
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l")  # the cursor is back
    assert next_commands(plain.replace("\r", ""))


@pytest.mark.slow
def test_the_summary_shows_what_summary_json_holds_and_the_next_commands_work(write_config, tmp_path):
    config = write_config(training={"eval_strategy": "steps", "eval_steps": 5, "max_steps": 60, "logging_steps": 20})
    printed = trained(config).stdout
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    logs = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [log["loss"] for log in logs if "loss" in log]
    evaluations = [log["eval_loss"] for log in logs if "eval_loss" in log]
    assert (summary["first_loss"], summary["last_loss"]) == (losses[0], losses[-1])
    assert (summary["first_eval_loss"], summary["eval_loss"]) == (evaluations[0], evaluations[-1])
    updates = [json.loads(line) for line in (run / "updates.jsonl").read_text().splitlines()]
    ranks = sorted(line["numerical_rank"] for line in updates if line["step"] == 60)
    assert summary["update_rank"] == ranks[(len(ranks) - 1) // 2]
    assert summary["adapter_rank"] == 8
    seconds = round(summary["training_seconds"])
    shown = rows(printed)
    assert shown == {
        "training loss": f"{losses[0]:.4f} → {losses[-1]:.4f} (first and last logged)",
        "evaluation loss": f"{evaluations[0]:.4f} → {evaluations[-1]:.4f} (first and last evaluation)",
        "mean token accuracy": f"{summary['eval_mean_token_accuracy']:.4f}",
        "rank of the update": f"{summary['update_rank']}, with adapters of rank 8",
        "time": (f"{seconds} s" if seconds < 60 else f"{seconds // 60} min {seconds % 60} s")
        + f" for 60 steps, {summary['seconds_per_step']:.2g} s each",
        "peak memory": decimal(summary["peak_memory_bytes"]),
        "trained": f"{summary['trainable_parameters']:,} parameters",
        "model": str(run / "model"),
        "exact state": str(run / "delta"),
        "metrics": str(run / "metrics.jsonl"),
    }
    commands = [shlex.split(line) for line in next_commands(printed)]
    assert [words[:2] for words in commands] == [
        ["scalora", name] for name in ("evaluate", "export", "report", "inspect")
    ]
    for _, *words in commands:
        result = scalora(*words)
        assert result.exit_code == 0, result.output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "results", "commands"),
    [
        ({"method": "lora", "data": {"eval": None}}, {"model", "adapter"}, ["report", "inspect"]),
        ({"save_model": False}, set(), ["report"]),
        ({"scalora": {"merge": "factored"}}, {"model", "adapter", "exact state"}, ["evaluate", "report", "inspect"]),
    ],
)
def test_only_what_is_there_and_applies_is_shown(settings, results, commands, write_config):
    printed = trained(write_config(training={"max_steps": 2}, track_updates=0, **settings)).stdout
    shown = rows(printed)
    assert shown.keys() & {"model", "adapter", "exact state"} == results
    assert [line.split()[1] for line in next_commands(printed)] == commands
    assert "rank of the update" not in shown
    assert ("evaluation loss" in shown) == ("data" not in settings)


@pytest.mark.slow
def test_divergence_is_said_once_and_logged_as_it_is(write_config, tmp_path):
    result = scalora("train", write_config(training={"learning_rate": 1e38}))
    assert result.exit_code == 1
    left_alone, *_ = warnings_in(result.stderr)
    assert re.match("warning: ScaLoRA left .* alone .* NaN or infinite entries", left_alone)
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: training diverged: loss is nan at step 2 of 10. No result is written; ")
    assert "training.learning_rate" in error
    logs = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [log["loss"] for log in logs if "loss" in log]
    assert math.isfinite(losses[0])
    assert losses[1:] == [None]


@pytest.mark.slow
def test_examples_that_are_cut_off_or_left_out_are_counted(write_config, write_jsonl):
    words = " red blue green pink"
    cut_off = [{"prompt": "say:", "completion": words} for _ in range(3)]
    left_out = [{"prompt": "say:" + words, "completion": " red"} for _ in range(2)]
    train = write_jsonl("long.jsonl", [*pairs(20), *cut_off, *left_out])  # the pairs fit exactly
    config = write_config(data={"train": str(train)}, training={"max_steps": 2, "max_length": 6})
    assert warnings_in(trained(config).stderr) == [
        "warning: 3 of 25 train examples are cut off at training.max_length=6 tokens",
        "warning: 2 of 25 train examples are left out: nothing to train on is within training.max_length=6 tokens",
    ]


@pytest.mark.slow
def test_texts_that_are_cut_off_are_counted(encoder_folder, write_config, write_jsonl):
    texts = [{"text": " red" * (100 if i < 3 else 4), "label": i % 2} for i in range(12)]
    data = {"train": str(write_jsonl("texts.jsonl", texts)), "eval": None}
    config = write_config(model=str(encoder_folder), task="classification", data=data, training={"max_steps": 2})
    assert warnings_in(trained(config).stderr) == [
        f"warning: data {data['train']!r}: 3 of 12 texts are truncated to 64 tokens (all that the model takes)"
    ]


@pytest.mark.slow
def test_examples_beyond_the_models_maximum_are_said(write_config, write_jsonl):
    train = write_jsonl("long.jsonl", [*pairs(10), {"prompt": "say:" + " red" * 80, "completion": " red"}])
    config = write_config(data={"train": str(train)}, training={"max_steps": 2})
    (line,) = warnings_in(trained(config).stderr)
    assert line.startswith("warning: 1 of 11 train examples are longer than the tokenizer's model_max_length=64")


@pytest.mark.slow
def test_weights_that_a_model_lacks_are_named(causal_folder, write_config, tmp_path):
    shutil.copytree(causal_folder, tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    result = trained(write_config(model=str(tmp_path / "base"), training={"max_steps": 2}))
    assert warnings_in(result.stderr) == [
        f"warning: model {str(tmp_path / 'base')!r} has no weights for 1 of its parameters "
        "(model.layers.1.mlp.up_proj.weight): they start at random"
    ]


@pytest.mark.slow
def test_a_skipped_checkpoint_is_said_when_training_resumes(write_config, tmp_path):
    config = write_config(training={"max_steps": 4, "save_strategy": "steps", "save_steps": 2})
    assert not warnings_in(trained(config).stderr)
    (tmp_path / "run" / "trainer" / "checkpoint-4" / "trainer_state.json").unlink()
    (tmp_path / "run" / "summary.json").unlink()
    skipped, aside = warnings_in(trained(config, "--resume").stderr)
    assert re.match(r"warning: checkpoint '.*checkpoint-4' is skipped: it has no trainer_state.json", skipped)
    assert re.match(r"warning: checkpoint '.*checkpoint-4' is set aside as 'incomplete-checkpoint-4'", aside)


@pytest.mark.slow
def test_a_remainder_that_is_discarded_is_said(write_config):
    scalora_settings = {"warmup_steps": 1, "merge": "factored", "remainder_rank": 2}
    result = trained(write_config(scalora=scalora_settings, training={"max_steps": 12, "learning_rate": 5e-2}))
    (line,) = warnings_in(result.stderr)
    assert line.startswith("warning: remainder_rank=2 is too small for this run: ")


CHATTER = [
    ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward from kernels-community: %s."),
    ("transformers.trainer_utils", "The tokenizer has new PAD/BOS/EOS tokens that differ from %s"),
]
IRRELEVANT = "`is_gradient_checkpointing` is deprecated and will be removed in v6."


def complain():
    """Warn in every way, each twice, then fail."""
    for _ in range(2):
        for name, message in CHATTER:
            logging.getLogger(name).warning(message, "the model")
        warnings.warn(IRRELEVANT, FutureWarning, stacklevel=2)
        warnings.warn("two\n  lines", stacklevel=2)
        logging.getLogger("trl.trainer").warning("logged with %s", "an argument")
        logging.getLogger("scalora.somewhere").info("of no interest")
    raise InputError("enough")


def test_each_warning_is_one_line_and_shown_once(capsys):
    with pytest.raises(InputError), only_relevant_messages():
        complain()
    assert capsys.readouterr().err.splitlines() == ["warning: two lines", "warning: logged with an argument"]


def test_messages_are_as_before_afterwards(capsys):
    before = warnings.showwarning, list(warnings.filters), list(logging.getLogger().handlers)
    with only_relevant_messages():
        assert warnings.showwarning is not before[0]
    assert (warnings.showwarning, list(warnings.filters), list(logging.getLogger().handlers)) == before
    for name, message in CHATTER:
        assert logging.getLogger(name).filter(logging.makeLogRecord({"msg": message}))


@pytest.mark.slow
def test_a_file_that_cant_be_read_is_one_line(write_config, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": ')
    config = write_config(data={"train": str(tmp_path / "bad.jsonl")})
    command = [sys.executable, "-m", "scalora", "train", str(config)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 2
    (line,) = done.stdout.splitlines()
    assert line.startswith("error: data file ")


def test_debug_shows_everything(write_config, monkeypatch):
    monkeypatch.setattr(training, "prepare", lambda *settings, **options: complain())
    config = write_config()
    assert "deprecated" not in scalora("train", config).stderr
    with pytest.warns(FutureWarning, match="is deprecated"), pytest.warns(UserWarning, match="two"):
        result = scalora("train", config, "--debug")
    assert isinstance(result.exception, InputError)
