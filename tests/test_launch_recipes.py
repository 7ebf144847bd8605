"""The ready files in recipes/launch: what Accelerate, DeepSpeed and bash make of them, and that the docs name each."""

import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from typer.testing import CliRunner

from scalora.cli import app

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "recipes" / "launch"
CONFIGS = {
    "one-gpu": (DistributedType.NO, 1, 1),
    "ddp-8-gpus": (DistributedType.MULTI_GPU, 1, 8),
    "ddp-2-nodes": (DistributedType.MULTI_GPU, 2, 16),
    "fsdp2": (DistributedType.FSDP, 1, 8),
    "zero3": (DistributedType.DEEPSPEED, 1, 8),
}


def launched(name):
    """The arguments of the command in a file's first lines, as `accelerate launch` takes them."""
    command = re.search(r"accelerate launch (.*)", (FOLDER / f"{name}.yaml").read_text())[1]
    words = [word.replace("FIRST_NODE", "10.0.0.1") for word in shlex.split(command)]
    words = ["1" if word == "N" else word for word in words]
    return launch_command_parser().parse_args(words)


def test_every_file_is_tested_and_in_the_docs():
    page = (ROOT / "docs" / "distributed.md").read_text()
    for path in FOLDER.iterdir():
        assert path.stem in {*CONFIGS, "two-nodes"}, path
        assert path.suffix == ".json" or f"recipes/launch/{path.name}" in page, path


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_takes_the_config_and_the_command_in_it(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert (config.distributed_type, config.num_machines, config.num_processes) == CONFIGS[name]
    args, *_ = _validate_launch_command(launched(name))
    assert (args.training_script, args.training_script_args, args.module) == ("scalora", ["train", "CONFIG"], True)
    assert (args.num_processes, args.mixed_precision) == (CONFIGS[name][2], "no")
    assert args.multi_gpu == (CONFIGS[name][0] is DistributedType.MULTI_GPU)


def test_several_nodes_meet_at_the_first(monkeypatch):
    monkeypatch.chdir(ROOT)
    args, *_ = _validate_launch_command(launched("ddp-2-nodes"))
    assert (args.main_process_ip, args.main_process_port, args.machine_rank) == ("10.0.0.1", 29500, 1)


def test_fsdp_is_version_2_with_checkpoints_of_shards(monkeypatch):
    monkeypatch.chdir(ROOT)
    args, *_ = _validate_launch_command(launched("fsdp2"))
    for key, value in prepare_multi_gpu_env(args).items():
        if key.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.setenv(key, value)
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert "SHARDED" in str(plugin.state_dict_type)
    given = load_config_from_file(str(FOLDER / "fsdp2.yaml")).fsdp_config
    known = {field.name for field in dataclasses.fields(FullyShardedDataParallelPlugin)}
    assert {re.sub("^fsdp_(?!version)", "", key) for key in given} <= known


# Of DeepSpeed 0.19, https://www.deepspeed.ai/docs/config-json: those that the file may use.
_OF_DEEPSPEED = {
    "": {"zero_optimization", "bf16", "fp16", "gradient_clipping", "gradient_accumulation_steps", "train_batch_size",
         "train_micro_batch_size_per_gpu"},
    "zero_optimization": {"stage", "overlap_comm", "contiguous_gradients",
                          "stage3_gather_16bit_weights_on_model_save"},
    "bf16": {"enabled"},
}  # fmt: skip


def test_deepspeed_splits_all_and_takes_from_the_run_what_the_run_says():
    config = load_config_from_file(str(FOLDER / "zero3.yaml"))
    path = ROOT / config.deepspeed_config["deepspeed_config_file"]
    content = json.loads(path.read_text())
    for section, keys in _OF_DEEPSPEED.items():
        assert (content[section] if section else content).keys() <= keys
    assert content["zero_optimization"]["stage"] == 3
    for key in ("gradient_clipping", "gradient_accumulation_steps", "train_micro_batch_size_per_gpu"):
        assert content[key] == "auto"


# ---- The script for SLURM, with stand-ins for SLURM's commands that note how they are called

STAND_INS = {
    "scontrol": 'echo "scontrol $*" >> "$NOTES"\n[ "$1" = show ] && printf "node7\\nnode8\\n" || true',
    "srun": 'echo "srun $*" >> "$NOTES"\ntrap \'echo TERM >> "$NOTES"; exit 143\' TERM\n'
    "for _ in $(seq $(($SECONDS_OF_SRUN * 20))); do sleep 0.05; done",
}


@pytest.fixture
def sbatch(tmp_path):
    """Starts the script; returns the process, and the file with the notes of the commands that it has called."""
    started = []
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)

    def start(seconds=0):
        notes = tmp_path / "notes"
        environment = os.environ | {
            "PATH": f"{tmp_path}:{os.environ['PATH']}", "NOTES": str(notes), "SECONDS_OF_SRUN": str(seconds),
            "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "42",
        }  # fmt: skip
        words = ["bash", FOLDER / "two-nodes.slurm", "run.yaml", tmp_path / "run"]
        started.append(subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True))
        return started[-1], notes

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_the_script_starts_one_launcher_for_each_node_and_its_options_are_the_commands_own(sbatch, tmp_path):
    process, notes = sbatch()
    assert process.wait(timeout=30) == 0, process.stderr.read()
    _, call = notes.read_text().splitlines()
    srun, _, torchrun = call.partition(" torchrun ")
    assert srun == "srun --kill-on-bad-exit=1"
    from torch.distributed.run import get_args_parser

    args = get_args_parser().parse_args(shlex.split(torchrun))
    assert (args.nnodes, args.nproc_per_node, args.rdzv_endpoint, args.rdzv_id) == ("2", "8", "node7:29500", "42-0")
    assert (args.module, args.training_script) == (True, "scalora")
    command, config, *options = args.training_script_args
    assert (command, config) == ("train", "run.yaml")
    assert options == ["--output_dir", str(tmp_path / "run"), "--overwrite"]
    shown = CliRunner().invoke(app, ["train", "--help"]).output
    assert "--overwrite" in shown
    assert "--resume" in shown


def test_the_script_resumes_where_there_is_a_checkpoint(sbatch, tmp_path):
    checkpoint = tmp_path / "run" / "trainer" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    process, notes = sbatch()
    assert process.wait(timeout=30) == 0
    assert notes.read_text().split()[-1] == "--overwrite"
    (checkpoint / "trainer_state.json").write_text("{}")
    process, notes = sbatch()
    assert process.wait(timeout=30) == 0
    assert notes.read_text().split()[-1] == "--resume"


def test_the_script_is_requeued_near_its_time_limit(sbatch):
    process, notes = sbatch(seconds=30)
    deadline = time.monotonic() + 30
    while not notes.exists() or "srun" not in notes.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=30) == 0
    assert notes.read_text().splitlines()[-2:] == ["TERM", "scontrol requeue 42"]


def test_a_failure_of_the_job_is_one_of_the_script(sbatch, tmp_path):
    (tmp_path / "srun").write_text("#!/usr/bin/env bash\nexit 3\n")
    process, _ = sbatch()
    assert process.wait(timeout=30) == 3


def test_the_script_has_what_shellcheck_would_ask_for():
    text = (FOLDER / "two-nodes.slurm").read_text()
    subprocess.run(["bash", "-n", FOLDER / "two-nodes.slurm"], check=True)
    assert "set -euo pipefail" in text
    code = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    assert "`" not in code
    words = re.sub(r"(?m)^\w+=.*$", "", re.sub(r'"[^"]*"', '""', code))  # assignments need no quotes
    assert not re.findall(r"\$\{?\w+", words)
