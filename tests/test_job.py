"""`torchrun … -m scalora train`: several processes are one run, which the first one writes."""

import json
import subprocess
import sys

import pytest
import yaml
from conftest import pairs

from scalora.parallel.job import let_the_first_speak


@pytest.fixture
def config(causal_folder, write_jsonl, tmp_path):
    path = tmp_path / "config.yaml"
    content = {
        "model": str(causal_folder),
        "output_dir": str(tmp_path / "run"),
        "data": {"train": str(write_jsonl("train.jsonl", pairs(32))), "eval": str(write_jsonl("eval.jsonl", pairs(4)))},
        "scalora": {"warmup_steps": 1},
        "training": {
            "max_steps": 3,
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "save_strategy": "steps",
            "save_steps": 2,
            "use_cpu": True,
        },
    }
    path.write_text(yaml.safe_dump(content))
    return path


def test_two_processes_are_one_run(config, tmp_path):
    run = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    done = subprocess.run([*torchrun, "-m", "scalora", "train", config], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (done.stdout.count("next:"), done.stderr.count("loading ")) == (1, 1)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert len([line for line in lines if "eval_loss" in line]) == 1
    assert json.loads((run / "summary.json").read_text())["steps"] == 3
    assert json.loads((run / "environment.json").read_text())["examples_per_step"] == 4
    names = {path.name for path in run.iterdir()}
    assert names >= {"model", "delta", "trainer", "config.yaml"}
    assert not [name for name in names if "earlier" in name or name.endswith(".partial")]
    assert {path.name for path in (run / "trainer").glob("*checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}


def test_an_error_is_told_by_the_first_process_at_once_and_by_others_only_if_they_live(monkeypatch):
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    let_the_first_speak()
    monkeypatch.setenv("RANK", "0")
    let_the_first_speak()
    assert not waited
    monkeypatch.setenv("RANK", "1")
    let_the_first_speak()
    assert waited
