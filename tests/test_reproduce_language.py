"""The recipes for language models on stand-ins: prompts as the model sees them, answers found in texts, tables."""

import json
import re
import statistics

import pytest
import stand_ins
from datasets import Dataset
from transformers import Gemma3Config, Gemma3TextConfig, LlamaConfig, SiglipVisionConfig

from scalora.runs.data import examples_of
from scalora.runs.dry_run import dry_run
from scalora.runs.evaluate import evaluate
from scalora.runs.math_score import expected_answer, final_answer, same_answer
from scalora.runs.settings import checked_settings
from scalora.runs.train import train
from scalora.studies.cell_tests import scores_file
from scalora.studies.reproduction import load_recipe
from scalora.studies.reproduction_table import write_table

BEFORE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n"
)
AFTER = "\n\n### Response:\n"

# By hand, in the words of the training set.
QUESTIONS = {
    "BoolQ": (
        "Please answer the following question with true or false, question: is the sky blue?\n\n"
        "Answer format: true/false",
        ["true", "false"],
        "false",
    ),
    "PIQA": (
        "Please choose the correct solution to the question: Cool a drink\n\nSolution1: Add ice.\n\nSolution2: Add "
        "salt.\n\nAnswer format: solution1/solution2",
        ["solution1", "solution2"],
        "solution2",
    ),
    "SIQA": (
        "Please choose the correct answer to the question: Kim ran. Why?\n\nAnswer1: for a bus Answer2: for fun "
        "Answer3: to rest\n\nAnswer format: answer1/answer2/answer3",
        ["answer1", "answer2", "answer3"],
        "answer3",
    ),
    "HellaSwag": (
        "Please choose the correct ending to complete the given sentence: Playing drums: A man sits. he\n\n"
        "Ending1: sings. Ending2: plays. Ending3: sleeps. Ending4: leaves.\n\n"
        "Answer format: ending1/ending2/ending3/ending4",
        ["ending1", "ending2", "ending3", "ending4"],
        "ending2",
    ),
    "WinoGrande": (
        "Please choose the correct answer to fill in the blank to complete the given sentence: Ann thanked Bea because "
        "_ had helped.\n\nOption1: Ann Option2: Bea\n\nAnswer format: option1/option2",
        ["option1", "option2"],
        "option2",
    ),
    "ARC-e": (
        "Please choose the correct answer to the question: What melts?\n\nAnswer1: sand Answer2: snow Answer3: salt "
        "Answer4: silk\n\nAnswer format: answer1/answer2/answer3/answer4",
        ["answer1", "answer2", "answer3", "answer4"],
        "answer2",
    ),
    "ARC-c": (
        "Please choose the correct answer to the question: What is woven?\n\nAnswer1: sand Answer2: snow Answer3: "
        "silk\n\nAnswer format: answer1/answer2/answer3",
        ["answer1", "answer2", "answer3"],
        "answer3",
    ),
    "OBQA": (
        "Please choose the correct answer to the question: Beaches are made of\n\nAnswer1: sand Answer2: snow "
        "Answer3: salt Answer4: silk\n\nAnswer format: answer1/answer2/answer3/answer4",
        ["answer1", "answer2", "answer3", "answer4"],
        "answer1",
    ),
}


@pytest.fixture(scope="module")
def words_tokenizer():
    texts = [BEFORE, AFTER, *(text for text, _, _ in QUESTIONS.values()), *stand_ins.COMMONSENSE_TRAIN.values()]
    return stand_ins.word_tokenizer([*texts, *stand_ins.MATH_TRAIN.values(), *stand_ins.GSM8K.values()] * 3)


def _sizes(tokenizer):
    tokens = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        **tokens,
        **heads,
        "max_position_embeddings": 1024,
    }


@pytest.fixture(scope="module")
def llama(words_tokenizer, tmp_path_factory):
    wide = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 32, "num_key_value_heads": 2}
    config = LlamaConfig(**_sizes(words_tokenizer) | wide)  # for LoRA-GA, which needs twice the rank
    return stand_ins.causal(tmp_path_factory.mktemp("llama"), words_tokenizer, config)


@pytest.fixture(scope="module")
def gemma(words_tokenizer, tmp_path_factory):
    """As google/gemma-3-12b-pt: a language model with one for images beside it."""
    text = Gemma3TextConfig(**_sizes(words_tokenizer), layer_types=["sliding_attention", "full_attention"])
    sight = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = Gemma3Config(text_config=text.to_dict(), vision_config=sight.to_dict(), mm_tokens_per_image=4)
    return stand_ins.causal(tmp_path_factory.mktemp("gemma"), words_tokenizer, config)


def _finished(reproduction, scored):
    """Train in this process, and score one method's model, as `scalora train` and `scalora evaluate` would."""
    for study in reproduction.studies.values():
        for cell in study.tuning_cells():
            train(cell.settings)
            if cell.method == scored:
                for test, content in cell.tests.items():
                    evaluate(str(cell.folder), checked_settings(content), scores_file(cell, test).parent)
    return reproduction


SHORT = ["--run.training.use_cpu", "true", "--run.training.max_steps", "2", "--run.training.eval_steps", "2"]


@pytest.fixture(scope="module")
def commonsense(llama, tmp_path_factory):
    root = tmp_path_factory.mktemp("commonsense")
    study = load_recipe("commonsense").studies["LLaMA2-7B"]
    words = [*stand_ins.commonsense(root, study.run["data"]), "--output_dir", str(root / "out")]
    words += ["--tasks.LLaMA2-7B.run.model", str(llama)]
    every = study.methods
    return _finished(load_recipe("commonsense", [*words, *SHORT], smoke=True, only=every), "scalora")


@pytest.fixture(scope="module")
def mathematics(gemma, tmp_path_factory):
    root = tmp_path_factory.mktemp("mathematics")
    words = [
        *stand_ins.mathematics(root),
        "--tasks.Gemma-3-12B.run.model",
        str(gemma),
        "--output_dir",
        str(root / "out"),
    ]
    words += [*SHORT, "--run.evaluate.max_new_tokens", "8"]
    return _finished(load_recipe("math", words, smoke=True, only=["Gemma-3-12B"]), "scalora")


def test_commonsense_goes_from_the_hubs_columns_to_a_table(commonsense):
    table = write_table(commonsense).table.set_index(["table", "method", "column"])["ours"]
    own = table["LLaMA2-7B", "scalora"]
    assert list(own.index) == [*QUESTIONS, "average"]
    assert own["average"] == pytest.approx(statistics.mean(own[list(QUESTIONS)]))
    assert "| scalora | 74.51 |" in (commonsense.folder / "table.md").read_text()
    cell = next(cell for cell in commonsense.studies["LLaMA2-7B"].tuning_cells() if cell.method == "scalora")
    scores = json.loads(scores_file(cell, "PIQA").read_text())
    outputs = (scores_file(cell, "PIQA").parent / "samples_exact_match.jsonl").read_text().splitlines()
    assert len(outputs) == scores["examples"]
    assert scores["examples"] == 3
    assert {"exact_match", "exact_match_unmatched", "multiple_choice", "acc_norm"} <= scores.keys()
    # All methods have gone through training; nothing has been written but by runs.
    trained = {path.parent.parent.name for path in commonsense.folder.glob("*/cells/*/*/summary.json")}
    assert len(trained) == 9


@pytest.mark.parametrize("test", QUESTIONS)
def test_the_prompts_of_commonsense(test, commonsense):
    text, choices, answer = QUESTIONS[test]
    cell = commonsense.studies["LLaMA2-7B"].tuning_cells()[0]
    settings = checked_settings(cell.tests[test])
    row = examples_of(settings.data, settings.data.eval, "test").rows[0]
    assert row == {
        "prompt": BEFORE + text + AFTER,
        "completion": f"the correct answer is {answer}",
        "choices": [f"the correct answer is {choice}" for choice in choices],
        "answer": f"the correct answer is {answer}",
    }
    pattern = settings.evaluate.answer_pattern
    assert re.search(pattern, row["completion"]).group() == answer
    for choice in choices:
        assert re.search(pattern, f"I think {choice} is right, not {answer}").group() == choice


def test_the_questions_that_are_held_out_are_not_trained_on():
    data = load_recipe("commonsense").studies["LLaMA2-7B"].run["data"]
    rows = {}
    for split in ("train", "eval"):
        spans = re.findall(r"train\[(\d*):(\d*)\]", data[split])
        rows[split] = [row for start, end in spans for row in range(int(start or 0), int(end or 170_420))]
    assert len(rows["eval"]) == 120
    assert sorted(rows["train"] + rows["eval"]) == list(range(170_420))


def test_only_the_answer_is_trained_on(commonsense):
    settings = commonsense.studies["LLaMA2-7B"].tuning_cells()[0].settings
    plan = dry_run(settings.model_copy(update={"output_dir": settings.output_dir + "-again"}))
    parts = plan.shown[0].parts
    row = stand_ins.COMMONSENSE_TRAIN
    assert [(text, trained) for text, trained in parts] == [
        (BEFORE + row["instruction"] + AFTER, False),
        (row["output"] + "<eos>", True),
    ]
    assert plan.lengths.limit == 256


def test_mathematics_goes_from_the_hubs_columns_to_a_table(mathematics):
    table = write_table(mathematics).table.set_index(["table", "method", "column"])["ours"]
    assert list(table["Gemma-3-12B", "scalora"].index) == ["GSM8K", "MATH", "average"]
    cell = next(cell for cell in mathematics.studies["Gemma-3-12B"].tuning_cells() if cell.method == "scalora")
    assert json.loads(scores_file(cell, "MATH").read_text())["examples"] == 7
    updated = {line["layer"] for line in map(json.loads, (cell.folder / "updates.jsonl").read_text().splitlines())}
    assert updated
    assert not [name for name in updated if "vision" in name]


def test_the_prompts_and_answers_of_mathematics(mathematics):
    cell = mathematics.studies["Gemma-3-12B"].tuning_cells()[0]
    rows = {}
    for test in ("GSM8K", "MATH"):
        settings = checked_settings(cell.tests[test])
        rows[test] = examples_of(settings.data, settings.data.eval, "test").rows[0]
    assert rows["GSM8K"] == {
        "prompt": BEFORE + stand_ins.GSM8K["question"] + AFTER,
        "completion": "The answer is: 1197",
    }
    assert rows["MATH"] == {
        "prompt": BEFORE + stand_ins.MATH["problem"] + AFTER,
        "completion": stand_ins.MATH["solution"],
    }
    train_row = examples_of(cell.settings.data, cell.settings.data.train, "train").rows[0]
    assert train_row == {
        "prompt": BEFORE + stand_ins.MATH_TRAIN["query"] + AFTER,
        "completion": stand_ins.MATH_TRAIN["response"],
    }


@pytest.mark.parametrize(
    ("test", "answer", "right"),
    [
        ("GSM8K", "3 + 4 = 7\nThe answer is: 1,197", True),
        ("GSM8K", "The answer is: 1196", False),
        ("MATH", r"Thus $x = \boxed{\frac{2}{4}}$. The answer is: 0.5", True),
        ("MATH", r"\boxed{\frac{1}{2}}, no: \boxed{2}", False),
    ],
)
def test_answers_are_compared_as_mathematics(test, answer, right, mathematics):
    settings = checked_settings(mathematics.studies["Gemma-3-12B"].tuning_cells()[0].tests[test])
    assert settings.evaluate.metrics == ["math"]
    expected = examples_of(settings.data, settings.data.eval, "test").rows[0]["completion"]
    assert same_answer(final_answer(answer), expected_answer(expected)) is right


# --- Templates ---


def _made(tmp_path, rows, **data):
    path = tmp_path / "rows.parquet"
    Dataset.from_list(rows).to_parquet(path)
    settings = checked_settings({"model": "m", "data": {"train": str(path), **data}})
    return examples_of(settings.data, str(path), "train").rows


def test_a_template_fills_columns_as_they_are_written(tmp_path):
    rows = [{"q": "1 < 2 & {x}?", "a": " yes "}]
    made = _made(tmp_path, rows, prompt="Q: {{ q }}\n", completion="{{ a }}")
    assert made[:] == {"prompt": ["Q: 1 < 2 & {x}?\n"], "completion": [" yes "]}


def test_what_a_template_makes_is_shared_by_the_runs_of_a_study(tmp_path):
    # As two processes would make it: of the same text, without the same objects.
    words = {"prompt": "{{ q }}", "completion": "{{ a }}"}
    files = [
        _made(tmp_path, [{"q": "a", "a": "b"}], **words | {"completion": text}).cache_files[0]["filename"]
        for text in ("{{ a }}", "".join(["{{ a", " }}"]), "{{ a }}.")
    ]
    assert files[0] == files[1] != files[2]


BAD = {
    "row 1: data.prompt can't be filled: 'question' is undefined; the columns are q, a": {
        "prompt": "{{ question }}",
        "completion": "{{ a }}",
    },
    "data.completion is not a template": {"prompt": "{{ q }}", "completion": "{{ a"},
    "row 1: data.prompt can't be filled: ZeroDivisionError": {"prompt": "{{ 1 / 0 }}", "completion": "{{ a }}"},
    "row 1: data.choices makes 'a, b', not a JSON list of texts: end it with": {
        "prompt": "{{ q }}",
        "completion": "{{ a }}",
        "choices": "a, b",
        "answer": "a",
    },
    "data.prompt needs data.completion": {"prompt": "{{ q }}"},
    "row 1: data.prompt can't be filled: access to attribute": {
        "prompt": "{{ q.__class__.__mro__ }}",
        "completion": "{{ a }}",
    },
}


@pytest.mark.parametrize("rows", [[{"q": "a", "a": "b"}, {"q": "c"}], [{"q": "a", "a": "b"}, {"q": "c", "a": None}]])
def test_a_template_writes_no_value_that_is_not_there(rows, tmp_path):
    with pytest.raises(ValueError, match=r"row 2: data\.completion can't be filled: a value is null"):
        _made(tmp_path, rows, prompt="{{ q }}", completion=" {{ a }}")
    made = _made(tmp_path, rows, prompt="{{ q }}{% if a %}?{% endif %}", completion=" {{ a | default('-', true) }}")
    assert made[:] == {"prompt": ["a?", "c"], "completion": [" b", " -"]}


@pytest.mark.parametrize(("message", "data"), BAD.items(), ids=BAD)
def test_a_template_that_does_not_work_is_named(message, data, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        _made(tmp_path, [{"q": "a", "a": "b"}], **data)
