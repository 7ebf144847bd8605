"""`torchrun … -m scalora train`: several processes are one run, which the first one writes."""

import json
import os
import signal
import subprocess
import sys

import pytest
import yaml
from conftest import pairs

from scalora.parallel.job import let_the_first_speak

SECONDS = 200


def run_within(seconds, words):
    """The exit status of torchrun, and what it prints; after some seconds it is ended with all that it has started.

    Its processes have sessions of their own, so it is asked to end them: it kills those that don't within 30 seconds.
    """
    command = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        printed, messages = command.communicate(timeout=seconds)
    finally:
        if command.poll() is None:
            command.terminate()
            try:
                command.wait(timeout=45)
            except subprocess.TimeoutExpired:
                os.killpg(command.pid, signal.SIGKILL)
    return command.returncode, printed, messages


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


@pytest.mark.slow
def test_two_processes_are_one_run(config, tmp_path):
    run = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    code, printed, messages = run_within(SECONDS, [*torchrun, "-m", "scalora", "train", config])
    assert code == 0, messages
    assert (printed.count("next:"), messages.count("loading ")) == (1, 1)
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
