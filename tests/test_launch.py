"""The command in several processes, as torchrun and `accelerate launch` start them, is one job with one result.

The processes are started by torchrun's launcher (`launched.py`); Accelerate is made to believe that there are GPUs
where it is to shard.
"""

import json
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from conftest import DEEPSPEED_LACKS, WORDS, needs_deepspeed, pairs
from launched import end_after_step, end_while_it_waits, kill_after_step, kill_while_saving, launch, start_deepspeed
from safetensors.torch import load_file
from test_broken_input import contents
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from scalora.cli import app

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

FSDP = {"fsdp": True, "fsdp_config": {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
STEPS = 6

ZERO = Path(__file__).parent.parent / "recipes" / "launch" / "zero3.json"
ON_CPU = {"DS_ACCELERATOR": "cpu", "DEEPSPEED_LOG_LEVEL": "error"}
BY_LAUNCHER = ON_CPU | {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(ZERO),
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
}


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
            "scalora": {"warmup_steps": 1, "mode": "auto"},
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


RUNS = {"ddp": {}, "fsdp": FSDP, "zero3": {}, "zero3 by config": {"deepspeed": str(ZERO)}}
VARIABLES = {"zero3": BY_LAUNCHER, "zero3 by config": ON_CPU}
NAMES = [pytest.param(name, marks=needs_deepspeed if name in VARIABLES else ()) for name in RUNS]


@pytest.fixture(scope="module")
def printed(config, place):
    """What the processes of each run print."""
    found = {}
    for name, settings in RUNS.items():
        if name in VARIABLES and DEEPSPEED_LACKS:
            continue
        file, variables = config(name, 2, **settings), VARIABLES.get(name)
        before = start_deepspeed if "config" in name else None
        error, *found[name] = launch(
            place / "logs" / name, "train", file, shards="fsdp" in name, before=before, environment=variables
        )
        assert error is None, found[name]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_several_processes_train_as_one_with_the_whole_batch(name, alone, printed, place):
    run = place / name
    assert bool(list((run / "trainer").glob("checkpoint-2/pytorch_model_fsdp*"))) == (name == "fsdp")
    assert len(list((run / "trainer").glob("checkpoint-2/global_step2/zero_pp_rank_*_optim_states.pt"))) == (
        2 if "zero3" in name else 0
    )
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


@pytest.mark.parametrize("name", NAMES)
def test_one_process_speaks_for_all(name, printed):
    (first, second), (messages, others) = printed[name]
    assert first.count("next:") == 1
    assert messages.count("loading /") == 1
    assert [line for line in messages.splitlines() if line.startswith("step ")]
    # What DeepSpeed has compiled for CPUs.
    assert not [line for line in second.splitlines() if not re.match("DeepSpeed .* built successfully", line)]
    spoken = ("step ", "warning: ", "error: ", "loading /", "[transformers]")
    assert not [line for line in others.splitlines() if line.startswith(spoken)]


@needs_deepspeed
def test_a_base_that_zero_3_has_loaded_in_parts_has_its_shapes(tokenizer, config, place):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=4, n_positions=32))
    model.save_pretrained(place / "gpt2")
    tokenizer.save_pretrained(place / "gpt2")
    content = yaml.safe_load(config("of gpt2", 2, max_steps=2, save_strategy="no").read_text())
    content["model"] = str(place / "gpt2")
    file = place / "of gpt2.yaml"
    file.write_text(yaml.safe_dump(content))
    error, _, messages = launch(place / "logs" / "of gpt2", "train", file, environment=BY_LAUNCHER)
    assert error is None, messages
    assert read(place / "of gpt2" / "summary.json")["steps"] == 2


def test_a_run_brings_its_own_optimizer_to_shards(config, place):
    words = ("--scalora.mode", "matrix")
    # The same sums in the same order: steps by matrices in float32 carry rounding errors far.
    scalora("train", config("matrix alone", 2, gradient_accumulation_steps=2), *words)
    error, _, messages = launch(place / "logs" / "matrix", "train", config("matrix", 2, **FSDP), *words, shards=True)
    assert error is None, messages
    found, wanted = metrics(place / "matrix"), metrics(place / "matrix alone")
    assert wanted[-1].keys() == found[-1].keys()
    assert any(line.get("scalora/matrix_share") for line in found)
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (found, wanted)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert worst(weights(place / "matrix"), weights(place / "matrix alone")) <= 1e-3


@pytest.mark.parametrize(
    ("method", "how"), [("block_signs", "fsdp"), pytest.param("lora", "zero3", marks=needs_deepspeed)]
)
def test_other_methods_write_their_adapter_and_the_merged_model_from_shards(method, how, config, place):
    name, words = f"{method} {how}", ("--method", method)
    scalora("train", config(f"{name} alone", 4), *words)
    error, _, messages = launch(
        place / "logs" / name, "train", config(name, 2, **RUNS[how]), *words, shards=how == "fsdp",
        environment=VARIABLES.get(how),
    )  # fmt: skip
    assert error is None, messages
    wanted = place / f"{name} alone"
    for file in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
        assert worst(load_file(place / name / file), load_file(wanted / file)) <= 1e-3
    found, wanted = (read(run / "adapter" / "adapter_config.json") for run in (place / name, wanted))
    assert set(found.pop("target_modules")) == set(wanted.pop("target_modules"))  # in no order
    assert found == wanted


def test_a_run_of_shards_is_exported_as_that_of_one_process(alone, printed, place):
    exported = []
    for run in (alone, place / "fsdp"):
        scalora("export", run, "--to", "adapter", "--output", place / f"{run.name} exported")
        assert read(place / f"{run.name} exported" / "export.json")["error"] < 1e-3
        found = load_file(place / f"{run.name} exported" / "adapter_model.safetensors")
        layers = {name.partition(".lora_A")[0] for name in found if ".lora_A" in name}
        exported.append({name: found[f"{name}.lora_B.weight"] @ found[f"{name}.lora_A.weight"] for name in layers})
    assert worst(*exported) <= 1e-3


def test_accelerate_s_own_settings_shard_too(config, printed, place, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    words = ["--config_file", "recipes/launch/fsdp2.yaml", "-m", "scalora"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    settings = {key: value for key, value in prepare_multi_gpu_env(args).items() if "FSDP" in key}
    file = config("launched", 2)
    error, _, messages = launch(place / "logs" / "launched", "train", file, shards=True, environment=settings)
    assert error is None, messages
    assert list((place / "launched" / "trainer").glob("checkpoint-2/pytorch_model_fsdp*"))
    assert not different_bits(tensors(place / "launched"), tensors(place / "fsdp"))
    assert not different_bits(weights(place / "launched"), weights(place / "fsdp"))


# ---- Killed and resumed

KILLS = {
    # What is trained, by whom it is ended and when, and the checkpoint from which it goes on.
    "ddp, the second process": ({}, kill_after_step, 1, 5, 4),
    "ddp, the first process": ({}, kill_after_step, 0, 3, 2),
    "fsdp, the second process": (FSDP, kill_after_step, 1, 5, 4),
    "fsdp, while it saves": (FSDP, kill_while_saving, 1, 4, 2),
    "fsdp, the first while it saves": (FSDP, kill_while_saving, 0, 4, 2),
    "zero3, the second process": ({}, kill_after_step, 1, 5, 4),
    "zero3, while it saves": ({}, kill_while_saving, 1, 4, 2),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_deepspeed if "zero" in name else ()) for name in KILLS]
)
def test_a_job_whose_process_is_killed_ends_says_so_and_goes_on_as_if_nothing_had_been(name, config, printed, place):
    settings, how, rank, step, checkpoint = KILLS[name]
    run, shards, unharmed = place / name, bool(settings), place / name.partition(",")[0]
    file, launcher = config(name, 2, **settings), VARIABLES.get(unharmed.name, {})
    variables = launcher | {"KILL_RANK": str(rank), "KILL_STEP": str(step)}
    start = time.monotonic()
    error, _, messages = launch(place / "logs" / name, "train", file, shards=shards, before=how, environment=variables)
    assert time.monotonic() - start < 60
    assert set(error.failures) == {rank}
    assert error.failures[rank].exitcode == -signal.SIGKILL
    assert not (run / "summary.json").exists()
    stopped = read(run / "stopped.json")
    assert (stopped["process"], stopped["processes"]) == (1 - rank, 2)
    assert stopped["step"] in (step, step - 1)
    assert "another process of the job has ended" in stopped["reason"] or "SIGTERM" in stopped["reason"]
    assert sum(len(error_lines(text)) for text in messages) <= 1
    failed = CliRunner().invoke(app, ["inspect", str(run)])
    assert f"is not finished (stopped at step {stopped['step']}: {stopped['reason']})" in failed.stderr

    error, _, (messages, _) = launch(
        place / "logs" / f"{name}, on", "train", file, "--resume", shards=shards, environment=launcher
    )
    assert error is None, messages
    assert not (run / "stopped.json").exists()
    (resumed,) = read(run / "environment.json")["resumed"]
    assert (resumed["step"], resumed["stopped"]) == (checkpoint, stopped)
    aside = {path.name for path in (run / "trainer").glob("incomplete-*")}
    assert aside == ({f"incomplete-checkpoint-{step}"} if how is kill_while_saving else set())
    assert not different_bits(tensors(run), tensors(unharmed))
    assert not different_bits(weights(run), weights(unharmed))
    assert [line["loss"] for line in metrics(run) if "loss" in line] == [
        line["loss"] for line in metrics(unharmed) if "loss" in line
    ]


@pytest.mark.parametrize(
    ("how", "exitcode", "said"), [(end_after_step, -signal.SIGTERM, 1), (end_while_it_waits, 128 + signal.SIGTERM, 0)]
)
def test_a_process_that_is_asked_to_end_says_so_even_while_it_waits_for_another(how, exitcode, said, config, place):
    name = f"ended, {exitcode}"
    variables = {"KILL_RANK": "0", "KILL_STEP": "3", "KILL_FILE": str(place / f"{name} file")}
    start = time.monotonic()
    error, _, (messages,) = launch(
        place / "logs" / name, "train", config(name, 4), processes=1, before=how, environment=variables
    )
    assert time.monotonic() - start < 60
    assert error.failures[0].exitcode == exitcode
    stopped = read(place / name / "stopped.json")
    assert (stopped["step"], stopped["reason"]) == (3, "it was asked to end (SIGTERM)")
    lines = error_lines(messages)
    assert len(lines) == said
    for line in lines:
        assert "it is not finished (stopped at step 3: it was asked to end (SIGTERM))" in line
        assert "`scalora train CONFIG --resume` goes on from" in line


@pytest.mark.parametrize(("name", "processes"), [("fsdp", 1), ("ddp", 1), ("fsdp", 4)])
def test_a_run_goes_on_in_another_number_of_processes(name, processes, config, printed, place):
    again = f"{name} on {processes}"
    file = config(again, 4 // processes, **RUNS[name])
    shutil.copytree(place / name, place / again)
    shutil.rmtree(place / again / "trainer" / f"checkpoint-{STEPS}")
    for result in ("summary.json", "delta", "model"):
        path = place / again / result
        path.unlink() if path.is_file() else shutil.rmtree(path)
    error, _, (messages, *_) = launch(
        place / "logs" / again, "train", file, "--resume", processes=processes, shards=bool(RUNS[name])
    )
    assert error is None, messages
    assert read(place / again / "environment.json")["resumed"][0]["step"] == STEPS - 2
    assert worst(weights(place / again), weights(place / name)) <= 1e-5


# ---- Refused

REFUSED = {
    "a mistyped key": ({"learning_rat": 1}, True, "unknown key 'training.learning_rat'"),
    "the best model": (
        {**FSDP, "load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2},
        True,
        "training.load_best_model_at_end=True with training.fsdp=True: .* set it to false",
    ),
    "FSDP1": (
        {"fsdp": True, "fsdp_config": {"fsdp_version": 1}},
        True,
        "training.fsdp=True with training.fsdp_config.fsdp_version=1: .*set it to 2",
    ),
    "CPUs": (FSDP, False, "training.fsdp=True: Accelerate splits weights over GPUs alone"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_ends_all_processes_at_once_with_one_line(name, config, place):
    settings, shards, words = REFUSED[name]
    file = config(f"refused {name}", 2, **settings)
    start = time.monotonic()
    error, _, messages = launch(place / "logs" / f"refused {name}", "train", file, shards=shards)
    assert time.monotonic() - start < 60
    assert error.failures[0].exitcode == 2
    (line,) = [line for text in messages for line in error_lines(text)]
    assert re.match(f"error: {words}", line)
    assert not (place / f"refused {name}").exists()


def test_a_folder_that_is_taken_ends_all_processes_with_one_line(alone, config, place):
    before = contents(alone)
    error, _, messages = launch(place / "logs" / "taken", "train", alone.with_suffix(".yaml"))
    assert error.failures[0].exitcode == 2
    (line,) = [line for text in messages for line in error_lines(text)]
    assert "is not empty: choose another or add --overwrite" in line
    assert contents(alone) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "dora"], "method='dora' with training.fsdp=True: of the methods only scalora"),
        (["--track_updates", "3"], "track_updates=3 with training.fsdp=True: no process has whole weights"),
        ([], "training.fsdp=True splits the weights over several processes, and this is one: start them with"),
    ],
)
def test_what_one_process_can_see_is_refused_in_one(words, said, config, place):
    result = CliRunner().invoke(app, ["train", str(config("refused alone", 4, **FSDP)), *words])
    assert (result.exit_code, len(error_lines(result.stderr))) == (2, 1)
    assert said in result.stderr
    assert not (place / "refused alone").exists()


# ---- Evaluated


def test_several_processes_score_as_one(alone, config, place):
    examples = [
        {"prompt": f"say: {a}", "completion": f" {b}", "choices": [f" {b}", f" {c}", " no"], "answer": i % 3}
        for i, (a, b, c) in enumerate(zip(WORDS, WORDS[1:], WORDS[2:] + WORDS[:1], strict=False))
    ]
    (place / "scored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in examples))
    content = yaml.safe_load((alone / "config.yaml").read_text())
    content["data"]["eval"] = str(place / "scored.jsonl")
    metrics = ["loss", "exact_match", "math", "multiple_choice"]
    content["evaluate"] = {"metrics": metrics, "batch_size": 2, "max_new_tokens": 4}
    file = place / "scored.yaml"
    file.write_text(yaml.safe_dump(content))
    scalora("evaluate", alone, file, "--output", place / "one")
    error, (shown, nothing), messages = launch(
        place / "logs" / "scored", "evaluate", alone, file, "--output", place / "two"
    )
    assert error is None, messages
    assert shown.count("exact_match") >= 1
    assert not nothing
    one, two = read(place / "one" / "results.json"), read(place / "two" / "results.json")
    kept = ["results.json", *(f"samples_{metric}.jsonl" for metric in metrics[1:])]
    for folder in (place / "one", place / "two"):
        assert sorted(path.name for path in folder.iterdir()) == kept
    for name in kept[1:]:
        assert (place / "one" / name).read_text() == (place / "two" / name).read_text()
    close = {key: pytest.approx(one[key], rel=1e-6) for key in ("loss", "perplexity")}
    assert two == one | close
    assert list(two) == list(one)


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_several_processes_score_a_head_as_one(task, encoder_folder, place):
    torch.manual_seed(0)
    labels = 2 if task == "classification" else 1
    model = AutoModelForSequenceClassification.from_pretrained(
        encoder_folder, num_labels=labels, ignore_mismatched_sizes=True
    )
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(place / task)
    AutoTokenizer.from_pretrained(encoder_folder).save_pretrained(place / task)
    texts = [" ".join(WORDS[: i + 1]) for i in range(9)]
    # The last example, in whose batch others fill up the places, has another loss than the others.
    rows = [{"text": t, "label": 3 * (i == 8) if labels == 1 else f"LABEL_{i % 8 // 4}"} for i, t in enumerate(texts)]
    (place / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = place / f"{task}.yaml"
    data, score = {"eval": str(place / f"{task}.jsonl")}, {"batch_size": 2}
    file.write_text(yaml.safe_dump({"model": "unused", "task": task, "data": data, "evaluate": score}))
    scalora("evaluate", place / task, file, "--output", place / "one.json")
    words = ("evaluate", place / task, file, "--output", place / "two.json")
    error, _, messages = launch(place / "logs" / task, *words, environment={"ACCELERATE_USE_CPU": "true"})
    assert error is None, messages
    one, two = read(place / "one.json"), read(place / "two.json")
    assert two.keys() == one.keys()
    near = {"loss": {"rel": 1e-6}, "mse": {"rel": 1e-6}, "pearson": {"abs": 1e-4}, "correlation": {"abs": 1e-4}}
    for key, value in one.items():
        assert two[key] == (pytest.approx(value, **near[key]) if key in near else value), key
