"""What is read from YAML files and command lines: numbers as people write them, texts as they stand, no key twice."""

import math
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from scalora.runs.errors import InputError
from scalora.runs.yaml_file import as_written, parse_yaml, parsed_overrides, read_yaml, yaml_dump

finite = st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=12)
# Texts that some reader of YAML takes for something else.
LOOKALIKES = [
    "yes",
    "no",
    "on",
    "off",
    "y",
    "n",
    "Yes",
    "NO",
    "true",
    "null",
    "~",
    "1e3",
    "1e-3",
    "017",
    "0o17",
    "0x1F",
    "12:30",
    "1:2:3",
    "2024-01-01",
    "2024-01-01T00:00:00Z",
    "1_000",
    ".inf",
    ".nan",
    "inf",
    "nan",
    "=",
    "<<",
    "-",
    "?",
    ":",
    "#",
    "1.",
    ".5",
    "+1",
    "*x",
    "&x",
    "!x",
    "|",
]
scalars = st.one_of(st.none(), st.booleans(), st.integers(), finite, texts, st.sampled_from(LOOKALIKES))
keys = texts.filter(bool)
content = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=12
)


def value_of(text):
    return parse_yaml(f"key: {text}")["key"]


@given(finite, st.sampled_from(["{!r}", "{:.3e}", "{:.3E}", "{:g}", "{:f}", "{:.17g}", "+{:e}", "{:_f}"]))
def test_every_way_to_write_a_float(number, form):
    text = form.format(abs(number) if form.startswith("+") else number)
    for read in (value_of(text), parsed_overrides(["--key", text])[0][1], parse_yaml(f"[{text}]")[0]):
        assert isinstance(read, (int, float))
        assert read == float(text)


@pytest.mark.slow
@given(st.integers())
def test_every_way_to_write_an_integer(number):
    for form in ("{}", "{:_}", "{:#x}", "{:#o}", "{:#b}"):
        read = value_of(form.format(number))
        assert type(read) is int
        assert read == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1e1", 10.0),
        ("1e-3", 1e-3),
        ("5e-5", 5e-5),
        ("5E-5", 5e-5),
        ("1e5", 1e5),
        ("1.e3", 1e3),
        (".5e1", 5.0),
        ("5.", 5.0),
        (".5", 0.5),
        ("1_000", 1000),
        ("0o17", 15),
        ("+7", 7),
        ("-.inf", -math.inf),
    ],
)
def test_numbers_that_readers_of_yaml_differ_about(text, number):
    assert value_of(text) == number
    assert parsed_overrides([f"--key={text}"]) == [("key", number)]


@pytest.mark.parametrize("text", ["017", "00", "08", "-007", "0_1"])
def test_a_leading_zero_is_refused_with_its_line_and_key(text, tmp_path):
    (tmp_path / "run.yaml").write_text(f"model: m\nlora:\n  r: {text}\n")
    with pytest.raises(InputError, match=rf"'lora\.r' on line 3 is {text}, which is octal to some"):
        read_yaml(tmp_path / "run.yaml", "config")
    with pytest.raises(InputError, match=f"--lora.r {text}: "):
        parsed_overrides(["--lora.r", text])
    assert value_of(f"'{text}'") == text


@given(st.sampled_from(["yes", "no", "on", "off", "Yes", "OFF", "y", "n", "12:30", "190:20:30", "2024-01-01", "nan"]))
def test_words_times_and_dates_are_texts(text):
    assert value_of(text) == text
    assert parsed_overrides(["--key", text]) == [("key", text)]


@pytest.mark.slow
@given(content)
def test_what_is_written_reads_back_the_same_here_and_elsewhere(value):
    text = yaml_dump({"key": value})
    assert parse_yaml(text) == {"key": value}
    assert yaml.safe_load(text) == {"key": value}


@pytest.mark.parametrize(
    "word", ["#### (.*)", "a # b", "Answer: (.*)", "*_proj", "&a", "!x", "- a", "%x", "@x", "`x`", "|", "<<", "a:"]
)
def test_a_word_of_the_command_line_is_a_text_as_it_stands(word):
    assert parsed_overrides(["--key", word]) == [("key", word)]


def test_a_word_in_brackets_or_quotes_is_yaml():
    words = ["--a", "[1e-3, no]", "--b", "{c: {d: 1}}", "--e", "'3'", '--f="1e3"']
    expected = [("a", [1e-3, "no"]), ("b", {"c": {"d": 1}}), ("e", "3"), ("f", "1e3")]
    assert parsed_overrides(words) == expected


@pytest.mark.parametrize(
    ("dotted", "named"),
    [
        ("methods.scalora_I.scalora.interval", "methods.scalora-I.scalora.interval"),
        ("methods.a_b.r", "methods.a_b.r"),
        ("methods.new_one.r", "methods.new_one.r"),
        ("methods.1.r", "methods.1.r"),
        ("run.learning_rate", "run.learning_rate"),
    ],
)
def test_a_word_of_the_command_line_names_what_the_file_has(dotted, named):
    content = {"methods": {"scalora-I": None, "a-b": {}, "a_b": {}, 1: {}}}
    assert as_written(content, dotted) == named


@pytest.mark.parametrize("words", [["--key", ""], ["--key="], ["--key", "  "]])
def test_an_empty_word_is_not_null(words):
    with pytest.raises(InputError, match="--key needs a value; null stands for none"):
        parsed_overrides(words)


# --- keys that are there twice ------------------------------------------------------------------------------------


@st.composite
def with_a_duplicate(draw):
    """A document in block or flow style with one key twice in one mapping, and the dotted name of that key."""
    path = draw(st.lists(st.sampled_from(["a", "b", "c"]), max_size=4))
    twice = draw(st.sampled_from(["key", "'key'", '"key"']))
    if draw(st.booleans()):
        text = "{key: 1, other: 2, " + twice + ": 3}"
        for name in reversed(path):
            text = "{" + name + ": " + text + "}"
    else:
        text = "".join(f"{'  ' * depth}{name}:\n" for depth, name in enumerate(path))
        indent = "  " * len(path)
        text += f"{indent}key: 1\n{indent}other:\n{indent}  key: 2\n{indent}{twice}: 3\n"
    return text, ".".join([*path, "key"])


@given(with_a_duplicate())
def test_a_key_that_is_there_twice_at_any_depth(document):
    text, name = document
    with pytest.raises(ValueError, match=rf"the key {re.escape(repr(name))} is there twice, on lines \d+ and \d+"):
        parse_yaml(text)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a: 1\nb: 2\na: 3", "the key 'a' is there twice, on lines 1 and 3"),
        ("list:\n- {x: 1}\n- {x: 1, y: 2, x: 3}", "the key 'list.1.x' is there twice, on lines 3 and 3"),
        ("m: &m {r: 1}\nx:\n  <<: *m\n  <<: *m", "the key 'x.<<' is there twice, on lines 3 and 4"),
        ("m: &m {r: 1, r: 2}\nx: *m", "the key 'm.r' is there twice"),
        ("1: a", "the key '1', which is not a text"),
        ("true: a", "the key 'true', which is not a text"),
        ("? [a]\n: b", "the key a list or mapping"),
        ("a: &a [*a]", "contains itself"),
        ("a: !!timestamp 2024-01-01", "has the tag"),
        ("a: !!set {x}", "has the tag"),
        ("a: !!int three", "is 'three', which is not a number"),
        ("[" * 5000, "nested too deeply"),
    ],
)
def test_what_a_config_may_not_hold(text, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        parse_yaml(text)


def test_a_merge_key_and_an_alias_give_keys_of_their_own():
    parsed = parse_yaml("m: &m {r: 1, list: [1]}\nx:\n  <<: *m\n  r: 2\ny: *m\n")
    assert parsed["x"] == {"r": 2, "list": [1]}
    parsed["y"]["r"] = 3
    parsed["y"]["list"].append(2)
    assert parsed["m"] == {"r": 1, "list": [1]}
    assert parsed["x"]["list"] == [1]


def test_the_file_and_the_line_are_named(tmp_path):
    path = Path(tmp_path, "study.yaml")
    path.write_text("output_dir: x\nrun: {}\nrun: {}\n")
    with pytest.raises(InputError, match=r"study file '.*study.yaml': the key 'run' is there twice, on lines 2 and 3"):
        read_yaml(path, "study")
    path.write_text("a: 1\n---\nb: 2\n")
    with pytest.raises(InputError, match="not valid YAML"):
        read_yaml(path, "study")
