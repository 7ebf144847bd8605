"""`scalora train` for the tasks of TRL's trainers: the weights of TRL's own, resumed to the same bits, and scored."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import CHAT_TEMPLATE, WORDS, pairs
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
)
from typer.testing import CliRunner

from scalora import ScaLoraCallback, ScaLoraConfig
from scalora.cli import app
from scalora.config import LORA_DEFAULTS
from scalora.runs.errors import InputError
from scalora.runs.rewards import reward_functions
from scalora.runs.sections import RewardSettings

RECIPES = Path(__file__).parents[1] / "recipes"
REWARDS = """\
def long(completions, number, **others):
    return [len(text) / 10 + n for text, n in zip(completions, number)]

def red(completions, **others):
    return [float("red" in text) for text in completions]
"""


def preferences(count):
    return [
        {"prompt": f"say: {WORDS[i % 10]}", "chosen": f" {WORDS[i % 7]}", "rejected": f" {WORDS[(i + 3) % 7]}"}
        for i in range(count)
    ]


def judged(count):
    return [p | {"label": i % 3 == 0} for i, p in enumerate(pairs(count))]


def asked(count):
    return [{"prompt": f"say: {WORDS[i % 10]}", "number": i % 4} for i in range(count)]


ROWS = {"dpo": preferences, "orpo": preferences, "reward": preferences, "kto": judged, "grpo": asked}
TRAINING = {
    "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "use_cpu": True,
    "gradient_checkpointing": False,
}  # fmt: skip
LORA = {"r": 2, "target_modules": ["q_proj", "down_proj"]}
ANSWERS = {"num_generations": 4, "max_completion_length": 4, "per_device_eval_batch_size": 4}


def write_config(tmp_path, task, model, train, **more):
    """A config of the task; keys of `more` with a dict are added to the section."""
    config = {
        "model": str(model), "task": task, "output_dir": str(tmp_path / "run"),
        "scalora": {"warmup_steps": 1}, "lora": LORA,
        "data": {"train": train if isinstance(train, (list, dict)) else str(train)},
        "training": TRAINING | {"max_steps": 4} | (ANSWERS if task == "grpo" else {}),
    }  # fmt: skip
    if task == "grpo":
        (tmp_path / "rewards.py").write_text(REWARDS)
        config["reward"] = {"file": str(tmp_path / "rewards.py"), "functions": ["long", "red"], "weights": [1, 2]}
    for key, value in more.items():
        config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def scalora(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.output


def refused(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 2, result.output
    (line,) = (line for line in result.output.splitlines() if line.startswith("error: "))
    return line


def interrupt(run, step):
    """The run as if it had been killed after the checkpoint of a step."""
    for path in run.glob("trainer/checkpoint-*"):
        if path.name != f"checkpoint-{step}":
            shutil.rmtree(path)
    (run / "summary.json").unlink()
    for name in ("model", "adapter", "delta"):
        shutil.rmtree(run / name, ignore_errors=True)


def weights(run):
    return load_file(run / "model" / "model.safetensors")


def same(found, wanted):
    assert found.keys() == wanted.keys()
    return all(torch.equal(found[name], wanted[name]) for name in found)


def by_trl(task, folder, rows, tmp_path, steps):
    """The weights after a training by TRL's trainer with `ScaLoraCallback`, with the defaults of `scalora train`."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    arguments, trainer = {
        "dpo": (DPOConfig, DPOTrainer), "kto": (KTOConfig, KTOTrainer), "orpo": (ORPOConfig, ORPOTrainer),
        "reward": (RewardConfig, RewardTrainer), "grpo": (GRPOConfig, GRPOTrainer),
    }[task]  # fmt: skip
    more = {"report_to": "none", "bf16": False, "save_strategy": "no", "max_steps": steps}
    if task == "grpo":
        functions = {}
        exec(REWARDS, functions)
        more |= ANSWERS | {"beta": 0.1, "reward_weights": [1, 2]}
        rewards = {"reward_funcs": [functions["long"], functions["red"]]}
    set_seed(42)
    if task == "reward":
        base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
        config = ScaLoraConfig(warmup_steps=1)
    else:
        base = AutoModelForCausalLM.from_pretrained(folder)
        config = ScaLoraConfig(warmup_steps=1, merge="dense" if task == "orpo" else "factored")
    lora = LoraConfig(**LORA_DEFAULTS | LORA, task_type="SEQ_CLS" if task == "reward" else "CAUSAL_LM")
    model = get_peft_model(base, lora)
    made = trainer(
        model, args=arguments(output_dir=str(tmp_path / "trl"), **TRAINING | more), callbacks=[ScaLoraCallback(config)],
        train_dataset=Dataset.from_list(rows), processing_class=AutoTokenizer.from_pretrained(folder),
        **(rewards if task == "grpo" else {}),
    )  # fmt: skip
    made.train()
    assert made.state.log_history[-2]["scalora/rescales"] == steps - 1
    return model.merge_and_unload().state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("task", list(ROWS))
def test_a_run_is_that_of_trls_trainer_with_the_callback_also_when_it_is_resumed(
    task, causal_folder, write_jsonl, tmp_path
):
    train = write_jsonl("train.jsonl", ROWS[task](12))
    more = {"save_strategy": "steps", "save_steps": 2} | ({"beta": 0.1} if task == "grpo" else {})
    config = write_config(tmp_path, task, causal_folder, train, training=more)
    scalora("train", config)
    whole = weights(tmp_path / "run")
    assert same(whole, by_trl(task, causal_folder, ROWS[task](12), tmp_path, steps=4))
    before = load_file(causal_folder / "model.safetensors")
    assert any(not torch.equal(whole[name], before[name]) for name in whole if name in before)
    interrupt(tmp_path / "run", 2)
    scalora("train", config, "--resume")
    assert same(weights(tmp_path / "run"), whole)
    kinds = {p.name for p in (tmp_path / "run").iterdir()}
    assert {"model", "delta"} < kinds
    assert ("adapter" in kinds) == (task in ("dpo", "kto", "grpo"))  # where auto is factored


@pytest.mark.slow
@pytest.mark.parametrize("task", ["dpo", "kto", "grpo"])
def test_a_start_that_changes_the_base_changes_it_once(task, causal_folder, write_jsonl, tmp_path):
    """TRL makes its copy of the adapter for reference with the same configuration, PiSSA's."""
    more = {"learning_rate": 1e-12, "max_steps": 1} | ({"beta": 0.1} if task == "grpo" else {})
    train = write_jsonl("train.jsonl", ROWS[task](8))
    scalora("train", write_config(tmp_path, task, causal_folder, train, method="pissa", scalora={}, training=more))
    before = load_file(causal_folder / "model.safetensors")
    for name, weight in weights(tmp_path / "run").items():
        if name in before:
            torch.testing.assert_close(weight, before[name], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_grpo_resumes_with_the_answers_and_the_order_of_the_epoch_that_it_stopped_in(
    causal_folder, write_jsonl, tmp_path
):
    # An epoch has 4 steps, two on the answers to each prompt: it stops between two such steps, in the second epoch.
    step = 5
    train = write_jsonl("train.jsonl", asked(2))
    more = {"num_iterations": 2, "max_steps": 6, "save_strategy": "steps", "save_steps": step, "beta": 0.1}
    config = write_config(tmp_path, "grpo", causal_folder, train, training=more)
    scalora("train", config)
    whole = weights(tmp_path / "run")
    interrupt(tmp_path / "run", step)
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    scalora("train", config, "--resume")
    assert same(weights(tmp_path / "run"), whole)
    (tmp_path / "again" / "trainer" / f"checkpoint-{step}" / "answers_0.pt").unlink()
    assert "lacks the answers" in scalora("train", config, "--resume", "--output_dir", tmp_path / "again")


SCORES = {
    "dpo": {"loss": "loss", "accuracy": "rewards/accuracies", "margin": "rewards/margins"},
    "orpo": {"accuracy": "rewards/accuracies", "margin": "rewards/margins"},
    "kto": {"loss": "loss", "margin": "rewards/margins", "chosen": "rewards/chosen"},
    "reward": {"loss": "loss", "accuracy": "accuracy", "margin": "margin"},
}


@pytest.mark.slow
@pytest.mark.parametrize("task", list(SCORES))
def test_what_evaluate_says_is_what_training_logs_whatever_the_size_of_a_batch(
    task, causal_folder, write_jsonl, tmp_path
):
    data = {"eval": str(write_jsonl("eval.jsonl", ROWS[task](11)))}
    train = write_jsonl("train.jsonl", ROWS[task](12))
    config = write_config(tmp_path, task, causal_folder, train, data=data, training={"save_strategy": "epoch"})
    scalora("train", config)
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = next(line for line in reversed(logged) if "eval_loss" in line)
    found = []
    for size in (4, 11):
        scalora("evaluate", tmp_path / "run", config, "--evaluate.batch_size", size, "--output", tmp_path / "s.json")
        found.append(json.loads((tmp_path / "s.json").read_text()))
    for score, metric in SCORES[task].items():
        assert found[0][score] == pytest.approx(found[1][score], abs=1e-5)
        assert found[0][score] == pytest.approx(logged[f"eval_{metric}"], abs=1e-5)
    assert "exact_match" in refused("evaluate", tmp_path / "run", config, "--evaluate.metrics", "[exact_match]")
    if task == "reward":
        return
    rows = ROWS[task](11)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    base, tokenizer = AutoModelForCausalLM.from_pretrained(causal_folder), AutoTokenizer.from_pretrained(causal_folder)
    if task == "dpo":
        wins = [
            reward(row, "chosen", model, base, tokenizer) > reward(row, "rejected", model, base, tokenizer)
            for row in rows
        ]
        assert found[0]["accuracy"] == pytest.approx(sum(wins) / len(wins))
    if task == "kto":
        good = [reward(row, "completion", model, base, tokenizer) for row in rows if row["label"]]
        assert found[0]["chosen"] == pytest.approx(sum(good) / len(good), abs=1e-5)


@torch.no_grad()
def reward(row, answer, model, base, tokenizer):
    """β times the log-likelihood ratio of an answer and its end, computed token by token."""
    start = len(tokenizer(row["prompt"])["input_ids"])
    ids = torch.tensor([tokenizer(row["prompt"] + row[answer] + "<eos>")["input_ids"]])
    each = [m(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None]) for m in (model, base)]
    return 0.1 * (each[0] - each[1])[start - 1 :].sum().item()


@pytest.mark.slow
def test_grpo_is_scored_by_the_mean_reward_of_new_answers(causal_folder, write_jsonl, tmp_path):
    (tmp_path / "own.py").write_text("def given(completions, number, **others):\n    return number\n")
    rewards = {"file": str(tmp_path / "own.py"), "functions": ["given"], "weights": [2.0]}
    data = {"eval": str(write_jsonl("eval.jsonl", asked(7)))}
    train = write_jsonl("train.jsonl", asked(4))
    config = write_config(tmp_path, "grpo", causal_folder, train, data=data, reward=rewards, training={"max_steps": 1})
    scalora("train", config)
    scalora("evaluate", tmp_path / "run", config, "--output", tmp_path / "s.json")
    found = json.loads((tmp_path / "s.json").read_text())
    mean = sum(row["number"] for row in asked(7)) / 7
    assert (found["reward"], found["rewards/given"]) == pytest.approx((2 * mean, mean))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["eval_reward"] == pytest.approx(2 * mean)


def test_a_pattern_rewards_answers_that_match_or_say_what_is_right():
    (any_number,) = reward_functions(RewardSettings(pattern=r"\d+"), ["prompt"])
    assert any_number(completions=["no", "12 apples"], prompts=["", ""]) == [0.0, 1.0]
    (right,) = reward_functions(RewardSettings(pattern=r"is (\d+)", answer="sum"), ["prompt", "sum"])
    chat = [{"role": "assistant", "content": "it is 7"}]
    assert right(completions=["it is 12", "it is 12", "12", chat], sum=[12, "13", 12, " 7"]) == [1.0, 0.0, 0.0, 1.0]


def conversations(task):
    question = {"role": "user", "content": "say: red"}
    good, bad = ([{"role": "assistant", "content": word}] for word in (" red", " blue"))
    return {
        "dpo": [{"chosen": [question, *good], "rejected": [question, *bad]}],
        "orpo": [{"prompt": [question], "chosen": good, "rejected": bad}],
        "reward": [{"chosen": [question, *good], "rejected": [question, *bad]}],
        "kto": [{"prompt": [question], "completion": good, "label": True}] * 2,
        "grpo": [{"prompt": [question], "number": 1}],
    }[task]


SHOWN = {
    "dpo": ["example 1 (chosen): 5 tokens, 2 of them trained on", "[[ red<eos>]]", "(rejected)", "[[ blue<eos>]]"],
    "orpo": ["example 1 (chosen)", "[[ red<eos>]]", "[[ blue<eos>]]"],
    "reward": ["example 1 (rejected): 5 tokens, scored as a whole"],
    "kto": ["example 1 (good)", "[[ red<eos>]]", "(bad)"],
    "grpo": ["answered 4 times", "12 of 4 examples; an epoch takes 12"],
}


@pytest.mark.parametrize("task", list(ROWS))
def test_a_dry_run_shows_what_is_learnt_of_texts_and_conversations(task, causal_folder, write_jsonl, tmp_path):
    train = write_jsonl("train.jsonl", ROWS[task](12))
    more = {"training": {"max_steps": -1, "num_train_epochs": 1}}
    said = scalora("train", write_config(tmp_path, task, causal_folder, train, **more), "--dry-run")
    merge = "factored" if task in ("dpo", "kto") else "dense"
    assert f"rescales 4 layers (auto) with a {merge} remainder" in said
    assert [words for words in SHOWN[task] if words not in said] == []
    train = write_jsonl("chats.jsonl", conversations(task))
    said = scalora("train", write_config(tmp_path, task, causal_folder, train), "--dry-run")
    assert "<|user|>say: red<eos>" in said
    assert "<|assistant|>" in said
    assert not (tmp_path / "run").exists()


PAIR = preferences(1)[0]
WRONG = {
    "no pair": ("dpo", [{"prompt": "a", "chosen": "b"}], {}, "no pair 'chosen' and 'rejected'; it has prompt, chosen"),
    "nothing": ("orpo", [PAIR, PAIR | {"rejected": " "}], {}, "row 2: column 'rejected' is ' ': there must be a text"),
    "a number": ("reward", [PAIR | {"chosen": 3}], {}, "row 1: column 'chosen' is 3, not a text"),
    "a margin": ("reward", [PAIR | {"margin": "big"}], {}, "row 1: column 'margin' is 'big', not a number"),
    "no prompt": (
        "dpo",
        [{"chosen": [{"role": "user", "content": "a"}], "rejected": [{"role": "user", "content": "b"}]}],
        {},
        "begin with different messages, and there is no column 'prompt'",
    ),
    "a label": ("kto", [*judged(2), judged(1)[0] | {"label": "fine"}], {}, "row 3: column 'label' is 'fine'"),
    "no format": ("kto", [{"prompt": "a"}], {}, "neither 'prompt', 'completion' and 'label' nor a pair"),
    "a taken name": ("grpo", [{"prompt": "a", "completions": "b"}], {}, "a column 'completions': TRL gives reward"),
    "images": ("dpo", [PAIR | {"image": "a.png"}], {}, "column 'image': dpo trains on texts alone"),
    "a merge": ("dpo", [PAIR], {"scalora": {"merge": "dense"}}, "scalora.merge='dense': it changes the base weights"),
    "a merge with KL": (
        "grpo", asked(2), {"training": {"beta": 0.1}, "scalora": {"merge": "stochastic"}}, "set it to factored or auto"
    ),
    "ReLoRA": ("kto", judged(2), {"method": "relora", "scalora": {}}, "method 'relora' can't train task 'kto'"),
    "MoRA": ("dpo", [PAIR], {"method": "mora", "scalora": {}}, "which the method does not keep"),
    "rewards": ("dpo", [PAIR], {"reward": {"pattern": "a"}}, "reward.pattern: only task: grpo takes rewards"),
    "two rewards": ("grpo", asked(2), {"reward": {"pattern": "a"}}, "reward.file or reward.pattern: both are set"),
    "weights": ("grpo", asked(2), {"reward": {"weights": [1]}}, "one for each of reward.functions, which are 2"),
    "a file": ("grpo", asked(2), {"reward": {"file": "no.py"}}, "reward.file='no.py' can't be read"),
    "a function": ("grpo", asked(2), {"reward": {"functions": ["long", "short"]}}, "no function 'short'; it has long"),
    "an answer": (
        "grpo",
        asked(2),
        {"reward": {"file": None, "functions": [], "weights": None, "pattern": "a", "answer": "sum"}},
        "reward.answer='sum': the data have no such column; they have prompt, number",
    ),
    "a bad pattern": ("grpo", asked(2), {"reward": {"pattern": "("}}, "reward.pattern='(': not a regular expression"),
    "TRL's weights": ("grpo", asked(2), {"training": {"reward_weights": [1, 1]}}, "set reward.weights"),
    "tokens": ("dpo", [PAIR], {"data": {"max_tokens": 5}}, "for dpo, set training.max_length instead"),
    "a key": ("kto", judged(2), {"training": {"betas": 1}}, "unknown key 'training.betas': did you mean 'beta'?"),
    "a stream": ("dpo", [PAIR], {"data": {"streaming": True}, "training": {"max_steps": -1}}, "training.max_steps"),
    "a stream for ORPO": ("orpo", [PAIR], {"data": {"streaming": True}}, "TRL's ORPOTrainer takes no streams"),
}  # fmt: skip


@pytest.mark.parametrize("what", list(WRONG))
def test_what_is_wrong_is_named_in_one_line_before_training(what, causal_folder, write_jsonl, tmp_path):
    task, rows, more, line = WRONG[what]
    config = write_config(tmp_path, task, causal_folder, write_jsonl("train.jsonl", rows), **more)
    assert line in refused("train", config)
    assert not (tmp_path / "run" / "config.yaml").exists()


BROKEN = {
    "def long(": ("reward.file=", ", line 1: SyntaxError"),
    "import nothing_of_the_kind": ("line 1: ModuleNotFoundError",),
    "raise SystemExit": ("line 1: SystemExit",),
    "async def long(completions, **others): return []\nred = long": ("'long'", "is asynchronous"),
}
FAILING = {
    "1 / 0": ("reward function 'long' of", ", line 2 failed: ZeroDivisionError"),
    "[1]": ("returned 1 rewards for 4 completions",),
    "'abcd'": ("returned 'abcd', not a list of numbers",),
    "[float('nan')] * 4": ("a number that is not finite",),
}


@pytest.mark.parametrize("code", list(BROKEN))
def test_errors_in_the_file_of_rewards_are_one_line(code, causal_folder, write_jsonl, tmp_path):
    config = write_config(tmp_path, "grpo", causal_folder, write_jsonl("train.jsonl", asked(4)))
    (tmp_path / "rewards.py").write_text(code)
    line = refused("train", config)
    assert [words for words in BROKEN[code] if words not in line] == []


@pytest.mark.parametrize("code", list(FAILING))
def test_errors_of_functions_that_reward_are_one_line(code, tmp_path):
    path = tmp_path / "rewards.py"
    path.write_text(f"def long(completions, **others):\n    return {code}\n")
    (function,) = reward_functions(RewardSettings(file=str(path), functions=["long"]), ["prompt"])
    with pytest.raises(InputError) as caught:
        function(completions=["", "", "", ""], prompts=[""] * 4)
    assert [words for words in FAILING[code] if words not in str(caught.value)] == []


@pytest.mark.slow
def test_a_resumed_run_has_the_rewards_that_it_began_with(causal_folder, write_jsonl, tmp_path):
    more = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    config = write_config(tmp_path, "grpo", causal_folder, write_jsonl("train.jsonl", asked(4)), training=more)
    scalora("train", config)
    interrupt(tmp_path / "run", 1)
    (tmp_path / "rewards.py").write_text(REWARDS + "# other\n")
    assert "the file of reward.file has changed" in refused("train", config, "--resume")


def test_the_head_of_a_reward_model_is_saved_and_has_its_own_rate(causal_folder, write_jsonl, tmp_path):
    train = write_jsonl("train.jsonl", preferences(8))
    config = write_config(
        tmp_path, "reward", causal_folder, train, head_learning_rate=0.5, training={"max_steps": 1}, method="lora",
        scalora={"warmup_steps": 2},
    )  # fmt: skip
    scalora("train", config)
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    (head,) = (tensor for name, tensor in saved.items() if name.endswith("score.weight"))
    assert torch.equal(head, weights(tmp_path / "run")["score.weight"])
    set_seed(42)
    start = AutoModelForSequenceClassification.from_pretrained(causal_folder, num_labels=1).score.weight
    assert (head - start).abs().mean().item() == pytest.approx(0.5, rel=1e-2)  # Adam's first step is its rate


@pytest.mark.parametrize("task", ["dpo", "reward"])
def test_a_tokenizer_without_a_template_takes_no_conversations(task, causal_folder, write_jsonl, tmp_path):
    shutil.copytree(causal_folder, tmp_path / "bare")
    for path in (tmp_path / "bare").glob("chat_template*"):
        path.unlink()
    tokens = tmp_path / "bare" / "tokenizer_config.json"
    tokens.write_text(json.dumps({k: v for k, v in json.loads(tokens.read_text()).items() if k != "chat_template"}))
    config = write_config(tmp_path, task, tmp_path / "bare", write_jsonl("train.jsonl", conversations(task)))
    way_out = {"dpo": "save one with it, next to the model", "reward": "set training.chat_template_path"}[task]
    assert f"the tokenizer has no chat template: {way_out}" in refused("train", config)
    if task == "reward":
        (tmp_path / "chat.jinja").write_text(CHAT_TEMPLATE)
        scalora("train", config, "--training.chat_template_path", tmp_path / "chat.jinja", "--dry-run")


@pytest.mark.parametrize("task", list(ROWS))
def test_the_recipe_of_each_task_is_a_config_that_train_takes(task, causal_folder, write_jsonl, tmp_path):
    rows = [row | {"answer": "1"} for row in asked(8)] if task == "grpo" else ROWS[task](8)
    path = write_jsonl("rows.jsonl", rows)
    words = ["--model", causal_folder, "--data.eval", path, "--output_dir", tmp_path / "run", "--use_cpu", "true"]
    train = json.dumps({str(path): 3, str(write_jsonl("more.jsonl", rows)): 1}) if task == "reward" else path
    limit = "max_completion_length" if task == "grpo" else "max_length"
    said = scalora(
        "train", RECIPES / f"{task}.yaml", *words, "--data.train", train, f"--training.{limit}", 32, "--dry-run"
    )
    assert "example 1" in said
