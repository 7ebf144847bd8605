"""The command in several processes, as torchrun and `accelerate launch` start them, is one job with one result.

The processes are started by torchrun's launcher (`launched.py`); Accelerate is made to believe that there are GPUs where
it is to shard.
"""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from conftest import WORDS, pairs
from launched import launch
from safetensors.torch import load_file
from test_broken_input import contents
from typer.testing import CliRunner

from scalora.cli import app
from scalora.engine import ScaLora

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

FSDP = {"fsdp": True, "fsdp_config": {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
STEPS = 6


def scalora(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result


def error_lines(text):
    return [line for line in text.splitlines() if "error: " in line or "Traceback" in line]


def read(path):
    return json.loads(Path(path).read_text())


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run):
    return load_file(run / "model" / "model.safetensors")


def tensors(run):
    return load_file(run / "delta" / "scalora_state.safetensors")


def worst(found, wanted):
    assert found.keys() == wanted.keys()
    return max(((found[key] - wanted[key]).norm() / wanted[key].norm()).item() for key in wanted)


def different_bits(found, wanted):
    assert found.keys() == wanted.keys()
    return [key for key in wanted if not torch.equal(found[key], wanted[key])]


@pytest.fixture(scope="module")
def place(causal_folder, tmp_path_factory):
    """A folder with data; of the five examples for evaluation, no number of processes has as many each."""
    place = tmp_path_factory.mktemp("launch")
    texts = [{"prompt": f"say: {WORDS[i]}", "completion": " " + " ".join(WORDS[: 2 * i + 1])} for i in range(5)]
    for name, rows in (("train", pairs(48)), ("eval", texts)):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


@pytest.fixture(scope="module")
def config(causal_folder, place):
    """Writes a config of a run in the place."""

    def write(name, batch, **training):
        content = {
            "model": str(causal_folder),
            "output_dir": str(place / name),
            "data": {"train": str(place / "train.jsonl"), "eval": str(place / "eval.jsonl")},
            "scalora": {"warmup_steps": 1},
            "training": {
                "max_steps": STEPS,
                "per_device_train_batch_size": batch,
                "per_device_eval_batch_size": batch,
                "logging_steps": 1,
                "learning_rate": 1e-2,
                "save_strategy": "steps",
                "save_steps": 2,
                "use_cpu": True,
                **training,
            },
        }
        path = place / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


@pytest.fixture(scope="module")
def alone(config, place):
    scalora("train", config("alone", 4))
    return place / "alone"


RUNS = {"ddp": {}, "fsdp": FSDP}


@pytest.fixture(scope="module")
def printed(config, place):
    """What the processes of each run print."""
    found = {}
    for name, settings in RUNS.items():
        error, *found[name] = launch(place / "logs" / name, "train", config(name, 2, **settings), shards="fsdp" in name)
        assert error is None, found[name]
    return found


@pytest.mark.parametrize("name", RUNS)
def test_several_processes_train_as_one_with_the_whole_batch(name, alone, printed, place):
    run = place / name
    assert bool(list((run / "trainer").glob("checkpoint-2/pytorch_model_fsdp*"))) == (name == "fsdp")
    found, wanted = metrics(run), metrics(alone)
    assert [line.keys() for line in found] == [line.keys() for line in wanted]
    for key, tolerance in {"loss": 1e-5, "eval_loss": 1e-6, "train_loss": 1e-5, "num_tokens": 0, "step": 0}.items():
        values = [line[key] for line in wanted if key in line]
        assert values
        assert [line[key] for line in found if key in line] == pytest.approx(values, rel=tolerance)
    assert read(run / "summary.json")["steps"] == STEPS
    assert worst(weights(run), weights(alone)) <= 1e-5
    assert worst(tensors(run), tensors(alone)) <= 1e-4
    assert {path.name for path in run.iterdir()} >= {"model", "delta", "trainer", "summary.json"}
    assert {path.name for path in (run / "delta").iterdir()} == {path.name for path in (alone / "delta").iterdir()}


def test_an_example_that_fills_up_the_last_batch_would_change_the_loss(alone, config, place):
    rows = (place / "eval.jsonl").read_text().splitlines(keepends=True)
    (place / "filled.jsonl").write_text("".join(rows + rows[:3]))
    output = place / "filled.json"
    scalora("evaluate", alone, alone / "config.yaml", "--data.eval", place / "filled.jsonl", "--output", output)
    assert abs(read(output)["loss"] / read(alone / "summary.json")["eval_loss"] - 1) > 1e-3


@pytest.mark.parametrize("name", RUNS)
def test_one_process_speaks_for_all(name, printed):
    (first, second), (messages, others) = printed[name]
    assert first.count("next:") == 1
    assert messages.count("loading /") == 1
    assert [line for line in messages.splitlines() if line.startswith("step ")]
    assert not second
    assert not [line for line in others.splitlines() if line.startswith(("step ", "warning: ", "error: ", "loading /"))]
