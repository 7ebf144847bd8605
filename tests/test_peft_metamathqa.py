"""`benchmarks/peft_metamathqa`: on a stand-in for PEFT's benchmark, and on its real code where there is a clone."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import peft_stand_in
import pytest
import torch
from conftest import WORDS
from models import tiny_llama
from peft import PeftModel
from peft_metamathqa.run import NAME, main
from transformers import AutoModelForCausalLM

FOLDER = Path(__file__).parents[1] / "benchmarks" / "peft_metamathqa"
EXPERIMENTS = sorted((FOLDER / "experiments" / "lora").iterdir())
CHECKOUT = os.environ.get("PEFT_CHECKOUT")


def experiment(tmp_path, name, model, parameters, source=EXPERIMENTS[0]):
    """An experiment like one of ours, on a tiny model."""
    folder = tmp_path / "mine" / "experiments" / "lora" / name
    folder.mkdir(parents=True)
    config = json.loads((source / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 4, "lora_alpha": 8}))
    (folder / "training_params.json").write_text(json.dumps({"model_id": str(model)} | parameters))
    return folder


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A clone with the stand-in; returns a function that runs an experiment in this process."""
    benchmark = tmp_path / "clone" / "method_comparison" / "MetaMathQA"
    benchmark.mkdir(parents=True)
    (benchmark / "utils.py").write_text(peft_stand_in.UTILS)
    (benchmark / "run.py").write_text(peft_stand_in.RUN)
    monkeypatch.setenv("SAVED", str(tmp_path / "saved"))
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.chdir(tmp_path)

    def run(folder):
        monkeypatch.delitem(sys.modules, "utils", raising=False)
        monkeypatch.setattr(sys, "path", [*sys.path])
        main([str(tmp_path / "clone"), str(folder), "--clean"])
        result = benchmark / "results" / f"lora--{folder.name}.json"
        return json.loads(result.read_text())

    yield run
    sys.modules.pop("utils", None)


MODES = pytest.mark.parametrize(
    ("source", "mode"), [*zip(EXPERIMENTS, ("auto", "matrix"), strict=True)], ids=["columns", "matrix"]
)


@MODES
def test_the_result_says_what_was_done_and_the_saved_adapter_is_whole(source, mode, stand_in, causal_folder, tmp_path):
    given = json.loads((source / "training_params.json").read_text())
    assert (given["optimizer_type"], given["optimizer_kwargs"]["mode"]) == (NAME, mode)
    given["optimizer_kwargs"] |= {"lr": 2e-2 if mode == "auto" else 4e-3, "warmup_steps": 2, "remainder_rank": 6}
    found = stand_in(experiment(tmp_path, "small", causal_folder, given, source))
    done = found[NAME]
    assert done["optimizer"] == ("AdamW" if mode == "auto" else "PairAdamW")
    assert (done["config"]["mode"], done["config"]["merge"], done["steps"]) == (mode, "factored", 20)
    assert found["run_info"]["train_config"]["optimizer_type"] == NAME
    assert found["run_info"]["train_config"]["optimizer_kwargs"] == given["optimizer_kwargs"]
    assert found["train_info"]["losses"][-1] < found["train_info"]["losses"][0] - 0.1

    # What was saved needs no scalora, and is all of the update: more than the factors of rank 4 can hold.
    assert done["rank_of_saved_adapter"] > 4
    assert found["train_info"]["file_size"] == done["bytes_of_trained_factors"] + done["bytes_of_remainder"]
    assert done["bytes_of_remainder"] > done["bytes_of_trained_factors"] / 4
    tokens = torch.randint(5, 60, (6, 12), generator=torch.Generator().manual_seed(0))
    base = AutoModelForCausalLM.from_pretrained(causal_folder, dtype=torch.bfloat16).eval()
    live = torch.load(tmp_path / "saved" / "logits.pt").float()
    with torch.no_grad():
        before = base(input_ids=tokens).logits.float()
        loaded = PeftModel.from_pretrained(base, tmp_path / "saved").eval()
        after = loaded(input_ids=tokens).logits.float()
    assert (after - live).norm() < 0.05 * (before - live).norm()


def test_other_experiments_run_as_they_would(stand_in, causal_folder, tmp_path):
    given = {"optimizer_type": "SGD", "optimizer_kwargs": {"lr": 0.1, "momentum": 0.9}, "lr_scheduler": None}
    found = stand_in(experiment(tmp_path, "plain", causal_folder, given))
    assert NAME not in found
    factors = 2 * 4 * 4 * (2 * 32 + 32 + 16)  # of q_proj and v_proj, in two layers, in float32
    assert 0 < found["train_info"]["file_size"] - factors < 4096


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"optimizer_type": "NoSuch"}, "Invalid optimizer_type: NoSuch"),
        ({"optimizer_type": NAME, "max_steps": 0}, "Invalid max_steps"),
        ({"optimizer_type": NAME, "compile": True}, "compile: true is not for ScaLoRA"),
        ({"optimizer_type": NAME, "optimizer_kwargs": {"lr": 1e-3, "merge": "dense"}}, "merge='dense'"),
        ({"optimizer_type": NAME, "optimizer_kwargs": {"lr": 1e-3, "turns": 1}}, "unknown ScaLoRA setting 'turns'"),
        (
            {"optimizer_type": NAME, "lr_scheduler": "linear", "optimizer_kwargs": {"lr": 1e-3, "mode": "matrix"}},
            "lr_scheduler='linear'",
        ),
    ],
)
def test_what_can_t_be_run_is_refused(parameters, message, stand_in, causal_folder, tmp_path):
    with pytest.raises(ValueError, match=message):
        stand_in(experiment(tmp_path, "wrong", causal_folder, parameters))


def test_folders_that_are_something_else_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="is no clone of huggingface/peft"):
        main([str(tmp_path), str(EXPERIMENTS[0])])
    (tmp_path / "method_comparison" / "MetaMathQA").mkdir(parents=True)
    (tmp_path / "method_comparison" / "MetaMathQA" / "run.py").touch()
    with pytest.raises(SystemExit, match=r"is no folder …/experiments/METHOD/NAME"):
        main([str(tmp_path), str(tmp_path)])


def test_the_experiments_differ_from_lora_by_the_optimizer_alone():
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in EXPERIMENTS]
    assert configs[0] == configs[1]
    assert (configs[0]["r"], configs[0]["lora_alpha"], configs[0]["target_modules"]) == (32, 64, None)


# ---- Its real code


# What the benchmark asks of an accelerator, of a CPU, which passes for one where the benchmark insists on it; its data,
# of local files; and its results elsewhere than in the clone.
BOOTSTRAP = """
import json, sys
from pathlib import Path
clone, work, experiment = map(Path, sys.argv[1:4])
benchmark = clone / "method_comparison" / "MetaMathQA"
sys.path[:0] = [str(benchmark), str(clone / "src")]
import datasets, torch

class Device(str):
    def __eq__(self, other):
        return str.__eq__(self, other) or other == "cuda"
    __hash__ = str.__hash__

nothing = {"reset_peak_memory_stats": None, "manual_seed_all": None, "empty_cache": None, "max_memory_reserved": 0,
           "memory_allocated": 0, "memory_reserved": 0, "get_device_name": "a CPU"}
for name, value in nothing.items():
    setattr(torch.cpu, name, lambda *given, value=value: value)
import peft.utils
peft.utils.infer_device = lambda: Device("cpu")

def load_dataset(name, config=None, split=None, streaming=False):
    folder = work / name.partition("/")[2]
    found = {
        path.stem: datasets.Dataset.from_list([json.loads(line) for line in path.read_text().splitlines()])
        for path in folder.glob("*.jsonl")
    }
    return found[split] if split else datasets.DatasetDict(found)

datasets.load_dataset = load_dataset
import utils
peft.utils.infer_device = utils.infer_device = lambda: "cpu"
utils.device = "cpu"
assert Path(peft.__file__).is_relative_to(clone)
utils.RESULT_PATH = utils.RESULT_PATH_TEST = utils.RESULT_PATH_CANCELLED = str(work / "results")
(work / "results").mkdir(exist_ok=True)
from peft_metamathqa.run import main
main([str(clone), str(experiment), "-v"])
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory, tokenizer):
    """A tiny model that knows its few sentences as well as the benchmark demands, and data with the hub's columns."""
    folder = tmp_path_factory.mktemp("work")
    draw = random.Random(0)
    sentences = [" ".join(draw.choice(WORDS[:5]) for _ in range(12)) for _ in range(100)]
    question = [f"How much is {a} and {b}?" for a in range(1, 10) for b in range(1, 8)]
    answer = [a + b for a in range(1, 10) for b in range(1, 8)]
    asked = list(zip(question, answer, strict=True))
    metamath = [
        {
            "type": "GSM_AnsAug",
            "query": q,
            "original_question": q,
            "response": f"It is {a}.\n#### {a}\nThe answer is: {a}",
        }
        for q, a in asked
    ]
    gsm8k = [{"question": q, "answer": f"It is {a}.\n#### {a}"} for q, a in asked]
    sets = {
        "MetaMathQA": {"train": metamath * 2},
        "gsm8k": {"train": gsm8k[:55], "test": gsm8k[55:]},
        "finewiki": {"train": [{"text": text} for text in sentences]},
    }
    for name, splits in sets.items():
        (folder / name).mkdir()
        for split, rows in splits.items():
            (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=256, **ends)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = tokenizer(sentences, return_tensors="pt", padding=True)["input_ids"]
    loss = torch.tensor(9.0)
    while loss > 1.7:
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


@pytest.mark.slow
@pytest.mark.skipif(CHECKOUT is None, reason="PEFT_CHECKOUT names no clone of huggingface/peft")
@MODES
def test_the_real_benchmark_runs_unchanged(source, mode, work, tmp_path):
    given = json.loads((source / "training_params.json").read_text())
    given["optimizer_kwargs"] |= {"lr": 2e-3 if mode == "auto" else 4e-4, "warmup_steps": 2, "remainder_rank": 6}
    small = {"max_steps": 30, "eval_steps": 15, "generation_kwargs": {"max_length": 200, "max_new_tokens": 12}}
    plain = {"optimizer_type": "AdamW", "optimizer_kwargs": {"lr": 2e-3, "weight_decay": 0.1}}
    results = {}
    for name, parameters in (("ours", given), ("lora", plain)):
        folder = experiment(tmp_path, name, work / "model", parameters | small, source)
        words = [sys.executable, "-c", BOOTSTRAP, CHECKOUT, work, folder]
        paths = f"{FOLDER.parent}{os.pathsep}{os.environ['PYTHONPATH']}"
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
        done = subprocess.run([*map(str, words)], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        (path,) = (work / "results").glob(f"lora--{name}*.json")
        results[name] = json.loads(path.read_text())
        path.unlink()
    published = json.loads(
        next(Path(CHECKOUT, "method_comparison/MetaMathQA/results").glob("lora--*.json")).read_text()
    )
    ours, lora = results["ours"], results["lora"]
    assert ours["train_info"].keys() == published["train_info"].keys()
    assert ours["train_info"]["metrics"][-1].keys() == published["train_info"]["metrics"][-1].keys()
    assert ours.keys() == published.keys() | {NAME}
    assert lora.keys() == published.keys()
    assert (ours["train_info"]["status"], ours["run_info"]["error_msg"]) == ("success", "")
    assert (ours[NAME]["config"]["mode"], ours[NAME]["steps"]) == (mode, 30)
    assert ours["train_info"]["num_trainable_params"] == lora["train_info"]["num_trainable_params"]
    sizes = ours[NAME]["bytes_of_trained_factors"], ours[NAME]["bytes_of_remainder"]
    assert ours["train_info"]["file_size"] == sum(sizes)
    assert ours[NAME]["rank_of_saved_adapter"] > 4
    if sys.version_info >= (3, 12):  # earlier, the benchmark can't save
        assert sizes[0] < lora["train_info"]["file_size"] < sizes[0] + 8192
    losses = [result["train_info"]["metrics"][-1]["train loss"] for result in (ours, lora)]
    assert losses[0] != losses[1]
