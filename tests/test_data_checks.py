"""What examples are used for is clear, or refused before a model is trained: columns, labels, lengths and tokens."""

import copy
import json
import shutil
import warnings

import pytest
import yaml
from conftest import WORDS, pairs
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny_gpt2, tiny_llama
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    OPTConfig,
    OPTForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)
from typer.testing import CliRunner

from scalora import ScaLoraConfig
from scalora.cli import app
from scalora.runs.data import label_names, load_examples, tokenized_for_classification
from scalora.runs.errors import InputError
from scalora.runs.formats import trl_examples
from scalora.runs.model_limits import TextLimit, positions, text_limit
from scalora.runs.prepare import prepare
from scalora.runs.sections import DataSettings
from scalora.runs.settings import load_settings

LIMIT = TextLimit(64, 64)


@pytest.fixture
def write_config(tmp_path):
    def write(rows, name="train.jsonl", **content):
        path = tmp_path / name
        path.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))
        content["data"] = {"train": str(path)} | content.get("data", {})
        content = {"output_dir": str(tmp_path / "run"), "training": {"max_steps": 1}} | content
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
        return tmp_path / "config.yaml"

    return write


def scalora(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def error_of(*words):
    result = scalora(*words)
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return line


# --- labels -------------------------------------------------------------------------------------------------------


def names_of(labels, **data):
    examples = Dataset.from_dict({"label": labels})
    return label_names(examples, "d", DataSettings(**data))


def columns_of(rows, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_examples(str(tmp_path / "rows.jsonl"), "train")


NAMED = {
    "texts": (["b", "NA", "a"], ["NA", "a", "b"]),
    "leading zeros": (["07", "01"], ["01", "07"]),
    "numbers as texts": (["10", "2", "-1"], ["-1", "2", "10"]),
    "numbers": ([10, 2, 2], ["2", "10"]),
    "truth values": ([True, False], ["false", "true"]),
    "fractions": ([1.5, 0.5], ["0.5", "1.5"]),
    "a number and a text": ([3, "three"], ["3", "three"]),
    "texts like values": (["null", "true", "1e5"], ["1e5", "null", "true"]),
}


@pytest.mark.parametrize("kind", NAMED)
def test_classes_are_named_as_they_are_written(kind, tmp_path, tokenizer):
    labels, names = NAMED[kind]
    examples = columns_of([{"text": f"text {i}", "label": label} for i, label in enumerate(labels)], tmp_path)
    assert label_names(examples, "d", DataSettings()) == names
    assert label_names(examples.select(reversed(range(len(labels)))), "d", DataSettings()) == names
    made = tokenized_for_classification(examples, "d", DataSettings(), "classification", tokenizer, names, LIMIT)
    written = [label if isinstance(label, str) else json.dumps(label) for label in labels]
    assert [names[place] for place in made.examples["labels"]] == written


SIMILAR = st.sampled_from(["good", "Good", "good ", "\tgood", "GOOD", "g ood", "go\u200bod", "\ufeffgood"])


@given(st.lists(SIMILAR, min_size=2, max_size=2, unique=True), st.permutations([0, 1, 2]))
@settings(max_examples=40, deadline=None)
def test_labels_that_differ_in_case_or_white_space_are_asked_about(similar, order):
    labels = [[*similar, "bad"][place] for place in order]
    with pytest.raises(InputError) as caught:
        names_of(labels)
    for label in similar:
        assert f"{label!r} (row {labels.index(label) + 1})" in str(caught.value)
    assert "data.similar_labels" in str(caught.value)
    assert names_of(labels, similar_labels="separate") == sorted(labels)
    first = next(label for label in labels if label != "bad")
    assert names_of(labels, similar_labels="merge") == sorted(["bad", first.strip()])


@pytest.mark.parametrize("labels", [[1, "1", 0], [1, 1.0, 0], [True, "true", 0]])
def test_labels_that_differ_in_their_type_are_asked_about(labels, tmp_path):
    examples = columns_of([{"label": label} for label in labels], tmp_path)
    with pytest.raises(InputError, match=r"\(row 1\) and .* \(row 2\)"):
        label_names(examples, "d", DataSettings())
    assert len(label_names(examples, "d", DataSettings(similar_labels="merge"))) == 2


def tokenised_labels(labels, names, tokenizer, task="classification", **data):
    examples = Dataset.from_dict({"text": [f"text {i}" for i in range(len(labels))], "label": labels})
    made = tokenized_for_classification(examples, "d", DataSettings(**data), task, tokenizer, names, LIMIT)
    return made.examples["labels"][:]


def test_a_label_of_no_class_is_named_with_its_row(tokenizer):
    with pytest.raises(InputError, match=r"data 'd', row 2: the label 'ugly' is none of the classes bad, good$"):
        tokenised_labels(["bad", "ugly"], ["bad", "good"], tokenizer)
    with pytest.raises(InputError, match=r"row 1: the label 'Good ' .* write 'good'"):
        tokenised_labels(["Good ", "bad"], ["bad", "good"], tokenizer)
    assert tokenised_labels(["Good ", "bad"], ["bad", "good"], tokenizer, similar_labels="merge") == [1, 0]


@pytest.mark.parametrize("value", ["nan", "inf", "-Infinity", "1e999", "1_000", "1,5", "0x10", "١", "", "true", "high"])
def test_a_text_that_is_no_finite_number_is_refused(value, tokenizer):
    with pytest.raises(InputError, match=r"data 'd', row 2: column 'label' is .* not a finite number"):
        tokenised_labels(["0.5", value], None, tokenizer, "regression")


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "1e39", "true", "null", "[1]", "9" * 50])
def test_a_json_value_that_is_no_finite_number_is_refused(value, write_config, encoder_folder):
    rows = "".join(f'{{"text": "a {i}", "label": {value if i == 3 else i}}}\n' for i in range(5))
    error = error_of("train", write_config(rows, model=str(encoder_folder), task="regression"))
    assert "row 4: column 'label' is" in error
    assert "not a finite number" in error


def test_numbers_of_a_regression_are_read_as_written(tokenizer):
    read = tokenised_labels([" 1e5", "-.5", "007", "+2.", "1E-3"], None, tokenizer, "regression")
    assert read == [1e5, -0.5, 7.0, 2.0, 1e-3]


@pytest.mark.parametrize(("text", "label", "column"), [("", "a", "text"), (" \n", "a", "text"), ("x", " ", "label")])
def test_a_row_without_text_or_label_is_refused(text, label, column, write_config, encoder_folder):
    rows = f'text,label\none,b\n"{text}",{label}\n'
    error = error_of("train", write_config(rows, "t.csv", model=str(encoder_folder), task="classification"))
    assert f"row 2: column {column!r} is" in error


def test_a_label_that_only_the_evaluation_data_has(write_config, encoder_folder, tmp_path):
    (tmp_path / "eval.csv").write_text("text,label\none,a\ntwo,NA\n")
    config = write_config(
        "text,label\none,a\ntwo,b\n",
        "t.csv",
        model=str(encoder_folder),
        task="classification",
        data={"eval": str(tmp_path / "eval.csv")},
    )
    assert "row 2: the label 'NA' is none of the classes a, b" in error_of("train", config)


# --- columns ------------------------------------------------------------------------------------------------------

TOOLS = [{"type": "function", "function": {"name": "pick", "parameters": {"type": "object", "properties": {"x": {}}}}}]
OTHER_TOOLS = [{"type": "function", "function": {"name": "drop", "parameters": {"type": "object", "rate": 1.5e-11}}}]
TEMPLATE = (
    "{% if tools %}<|tools|>{{ tools | tojson }}<eos>{% endif %}{% if loud is defined %}<|{{ loud }}|>{% endif %}"
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] or '' }}{{ m.tool_calls | tojson if m.tool_calls }}<eos>"
    "{% endfor %}"
)


@pytest.fixture(scope="module")
def tool_folder(causal_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tools") / "model"
    shutil.copytree(causal_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template, tokenizer.model_max_length = TEMPLATE, 4096
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    return folder


def trained_texts(config, tmp_path):
    """What TRL makes of the examples of a run."""
    run = prepare(load_settings(config, ["--training.max_length", "4096"]))
    trainer = run.make_trainer(AutoModelForCausalLM.from_pretrained(run.source.name))
    return [run.tokenizer.decode(ids) for ids in trainer.train_dataset["input_ids"]]


def test_tools_and_template_arguments_are_used_as_they_are_written(tool_folder, write_config, tmp_path):
    call = [{"type": "function", "function": {"name": "pick", "arguments": {"x": 1.23456789012345e-12, "y": None}}}]
    rows = [
        {"tools": TOOLS, "chat_template_kwargs": {}},
        {"tools": OTHER_TOOLS, "chat_template_kwargs": {"loud": "yes"}},
        {"tools": json.dumps(TOOLS), "chat_template_kwargs": {}},
        {"tools": None, "chat_template_kwargs": {}},
        {"chat_template_kwargs": {}},
    ]
    for i, row in enumerate(rows):
        row["messages"] = [{"role": "user", "content": "go"}, {"role": "assistant", "content": f" {WORDS[i]}"}]
    rows[0]["messages"].insert(1, {"role": "assistant", "tool_calls": call})
    another = [{"type": "function", "function": {"name": "drop", "arguments": {"x": "far", "z": [1, "2"]}}}]
    rows[1]["messages"].insert(1, {"role": "assistant", "content": None, "tool_calls": another})
    texts = trained_texts(write_config(rows, model=str(tool_folder)), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tool_folder)
    for row, text in zip(rows, texts, strict=True):
        tools = json.loads(row["tools"]) if isinstance(row.get("tools"), str) else row.get("tools")
        expected = tokenizer.apply_chat_template(
            row["messages"], tools=tools, tokenize=False, **row["chat_template_kwargs"]
        )
        assert text == expected
    assert "null" not in texts[1]  # nothing of the other row's tools


def test_settings_of_rescales_are_named_that_a_method_does_not_have(write_config, causal_folder):
    def messages(**content):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always", UserWarning)
            prepare(load_settings(write_config(pairs(4), model=str(causal_folder), **content)))
        return [str(warning.message) for warning in found if "scalora" in str(warning.message)]

    scalora = {"mode": "matrix", "interval": 5, "warmup_steps": ScaLoraConfig.warmup_steps}
    assert messages(method="block_signs", scalora=scalora) == [
        "scalora.interval=5, scalora.mode='matrix': ignored, because the method 'block_signs' has no rescales (the "
        "method scalora has)"
    ]
    assert messages(method="scalora", scalora=scalora) == messages(method="lora", scalora={}) == []


def test_columns_that_are_not_used_are_named(write_config, causal_folder, encoder_folder):
    rows = [row | {"id": 1, " note": "x"} for row in pairs(4)]
    with pytest.warns(UserWarning, match=r"train\.jsonl': columns ignored: id, ' note'$"):
        prepare(load_settings(write_config(rows, model=str(causal_folder))))
    rows = [{"text": "a", "label": i % 2, "tools": "hammer"} for i in range(4)]
    with pytest.warns(UserWarning, match="columns ignored: tools$"):
        prepare(load_settings(write_config(rows, model=str(encoder_folder), task="classification")))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        prepare(load_settings(write_config(pairs(4), model=str(causal_folder))))


CHAT = [{"role": "user", "content": "go"}, {"role": "assistant", "content": "red"}]
UNUSABLE = {
    "images": ({"messages": CHAT, "images": ["a.png"]}, "'images'"),
    "one image": ({"prompt": "a", "completion": "b", "image": "a.png"}, "'image'"),
    "tokens": ({"input_ids": [1, 2], "labels": [1, 2]}, "'input_ids'"),
    "a mask of the completion": ({"text": "a", "completion_mask": [1]}, "'completion_mask'"),
    "a mask of the assistant": ({"text": "a", "assistant_masks": [1]}, "'assistant_masks'"),
    "positions": ({"text": "a", "position_ids": [1]}, "'position_ids'"),
    "tools of another kind": ({"messages": CHAT, "tools": ["pick"]}, "row 2: column 'tools'"),
    "tools that are no JSON": ({"messages": CHAT, "tools": "pick"}, "row 2: column 'tools'"),
    "template arguments of another kind": ({"messages": CHAT, "chat_template_kwargs": "x"}, "row 2: column 'chat"),
    "a content in parts": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        "row 2: the content of a message in column 'messages'",
    ),
    "a content that is a number": ({"messages": [{"role": "user", "content": 3}]}, "row 2: the content of a message"),
    "a completion that is a number": ({"prompt": "a", "completion": 3}, "row 2: column 'completion' is 3, not a text"),
    "a completion of nothing": ({"prompt": "a", "completion": ""}, "row 2: column 'completion' is ''"),
    "no completion": ({"prompt": "a"}, "row 2: column 'completion' has no value"),
    "a name misspelt": ({"prompt": "a", "completoin": "b"}, "row 2: column 'completion' has no value"),
}
USABLE = {
    "messages": {"messages": CHAT, "tools": TOOLS, "chat_template_kwargs": {}},
    "prompt": {"prompt": "a", "completion": "b"},
    "text": {"text": "a"},
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_what_can_not_be_trained_on_is_named(kind, tmp_path):
    row, named = UNUSABLE[kind]
    good = [USABLE[column] for column in USABLE if column in row and "row 2" in named]
    examples = columns_of([*good, row], tmp_path)
    with pytest.raises(InputError) as caught:
        trl_examples(examples, "d", DataSettings(), "sft")
    assert named in str(caught.value)


def test_a_column_of_texts_that_is_asked_for_is_used(tmp_path):
    examples = columns_of([{"messages": CHAT, "story": "once"}], tmp_path)
    assert trl_examples(examples, "d", DataSettings(text="story"), "sft").column_names == ["story"]
    with pytest.raises(InputError, match="no column 'tale'; it has messages, story"):
        trl_examples(examples, "d", DataSettings(text="tale"), "sft")


def test_numbers_in_a_csv_file_are_texts_to_train_on(tmp_path):
    (tmp_path / "sums.csv").write_text("prompt,completion\n1 plus 1,2\n1 plus 2,03\n")
    rows = trl_examples(load_examples(str(tmp_path / "sums.csv"), "train"), "d", DataSettings(), "sft")
    assert list(rows) == [{"prompt": "1 plus 1", "completion": "2"}, {"prompt": "1 plus 2", "completion": "03"}]


# --- lengths ------------------------------------------------------------------------------------------------------

SMALL = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 40,
}
POSITIONS = {
    "BERT": (lambda: BertForSequenceClassification(BertConfig(**SMALL)), 40, True),
    "RoBERTa": (lambda: RobertaForSequenceClassification(RobertaConfig(**SMALL, pad_token_id=1)), 38, True),
    "RoBERTa with another padding": (
        lambda: RobertaForSequenceClassification(RobertaConfig(**SMALL, pad_token_id=5)),
        34,
        True,
    ),
    "OPT": (lambda: OPTForSequenceClassification(OPTConfig(**SMALL, ffn_dim=16, word_embed_proj_dim=16)), 40, True),
    "GPT-2": (tiny_gpt2, 64, True),
    "Llama": (lambda: tiny_llama(max_position_embeddings=40), 40, False),
    "ModernBERT": (
        lambda: ModernBertForSequenceClassification(ModernBertConfig(**SMALL, pad_token_id=1, cls_token_id=2)),
        40,
        False,
    ),
}


@pytest.mark.parametrize("name", POSITIONS)
def test_the_positions_of_a_model_are_those_that_it_has(name):
    make, tokens, firm = POSITIONS[name]
    model = make().eval()
    assert positions(model) == (tokens, firm)
    ids = model.dummy_inputs["input_ids"].new_full((1, tokens), 7)
    model(input_ids=ids)
    if firm:
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=ids.new_full((1, tokens + 1), 7))


def test_texts_are_truncated_where_the_model_or_the_setting_says(tokenizer):
    bert = BertForSequenceClassification(BertConfig(**SMALL | {"max_position_embeddings": 2000}))
    unlimited = copy.deepcopy(tokenizer)
    unlimited.model_max_length = int(1e30)
    assert text_limit(None, unlimited, bert) == (512, 2000)
    assert text_limit(1000, unlimited, bert) == (1000, 2000)
    assert text_limit(5000, unlimited, bert) == (2000, 2000)
    unlimited.model_max_length = 100
    assert text_limit(None, unlimited, bert) == (100, 100)


def test_truncated_texts_are_counted_exactly(tokenizer):
    rows = {"text": [" red" * n for n in (63, 64, 65, 100)], "label": ["a", "b", "a", "b"]}
    with pytest.warns(UserWarning, match=r"data 'd': 2 of 4 texts are truncated to 64 tokens .*data\.max_tokens"):
        made = tokenized_for_classification(
            Dataset.from_dict(rows), "d", DataSettings(), "classification", tokenizer, ["a", "b"], TextLimit(64, 2048)
        )
    assert made.truncated == 2
    assert [len(ids) for ids in made.examples["input_ids"]] == [63, 64, 64, 64]
    assert set(made.examples.column_names) <= {"input_ids", "token_type_ids", "attention_mask", "labels"}


@pytest.mark.parametrize("packing", [False, True])
def test_sequences_that_the_model_has_no_positions_for_are_refused(packing, tokenizer, write_config, tmp_path):
    model = tiny_gpt2()
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    rows = [*pairs(3), {"prompt": "say:", "completion": " red" * 80}]
    config = write_config(rows, model=str(tmp_path / "gpt2"), training={"max_steps": 1, "packing": packing})
    for flags in ([], ["--dry-run"]):
        error = error_of("train", config, *flags)
        assert "longer than the 64 positions of the model: set training.max_length" in error
    assert not (tmp_path / "run").exists()


# --- tokens -------------------------------------------------------------------------------------------------------


@pytest.fixture
def changed(tmp_path):
    """A copy of a model with another tokenizer."""

    def make(folder, change):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        change(tokenizer)
        copy = tmp_path / "changed"
        shutil.copytree(folder, copy)
        for name in ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
            (copy / name).unlink(missing_ok=True)
        tokenizer.save_pretrained(copy)
        return str(copy)

    return make


def without_padding(tokenizer):
    tokenizer.pad_token = tokenizer.eos_token = None


def without_template(tokenizer):
    tokenizer.chat_template = None


def with_another_padding(tokenizer):
    tokenizer.add_special_tokens({"pad_token": "<padding>"})


def with_a_new_word(tokenizer):
    tokenizer.add_tokens(["<extra>"])


TEXTS = [{"text": f"{WORDS[i]} <extra>", "label": WORDS[i % 2]} for i in range(4)]
SPOKEN = [{"prompt": "say: <extra>", "completion": " red"}] * 4
CHATS = [{"messages": [{"role": "user", "content": "go"}, {"role": "assistant", "content": " red"}]}] * 4
LACKING = {
    "no padding for texts": ("classification", without_padding, TEXTS, "no padding token"),
    "no padding for sft": ("sft", without_padding, SPOKEN, "no padding token"),
    "no template": ("sft", without_template, CHATS, "no chat template"),
    "a padding that the embedding lacks": ("classification", with_another_padding, TEXTS, "'<padding>'"),
    "the same for sft": ("sft", with_another_padding, SPOKEN, "'<padding>'"),
    "a token that the embedding lacks": ("classification", with_a_new_word, TEXTS, "'<extra>'"),
    "such a token for sft": ("sft", with_a_new_word, SPOKEN, "'<extra>'"),
}


@pytest.mark.parametrize("kind", LACKING)
def test_what_a_tokenizer_lacks_is_found_before_training(
    kind, changed, causal_folder, encoder_folder, write_config, tmp_path
):
    task, change, rows, named = LACKING[kind]
    model = changed(causal_folder if task == "sft" else encoder_folder, change)
    config = write_config(rows, model=model, task=task)
    for flags in ([], ["--dry-run"]):
        error = error_of("train", config, *flags)
        assert named in error
        if "<" in named:
            size = AutoModelForCausalLM.from_pretrained(causal_folder).config.vocab_size
            assert f"embedding has only {size} rows" in error
    assert not (tmp_path / "run").exists()
