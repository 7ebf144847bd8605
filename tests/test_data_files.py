"""Files of examples are read as they were written: every text, name and number, or an error that names file and row."""

import csv
import json
import os
import tempfile
from datetime import date
from pathlib import Path

import datasets
import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalora.runs.data import load_examples
from scalora.runs.errors import InputError

# Words that readers of tables take for something else than a text.
GUESSED = (
    *(
        "NA",
        "N/A",
        "nan",
        "NaN",
        "None",
        "null",
        "NULL",
        "true",
        "False",
        "inf",
        "-Infinity",
        "",
        " ",
        "#N/A",
        "\ufeff",
    ),
    *("01", "007", "1", "-1", "1.0", "1e5", "1_000", "1,000", "0x10", "9" * 30, "2020-01-01", "2020-01-01T00:00:00Z"),
    *(" leading", "trailing ", '"', '""', 'say "so"', "a,b", "a\nb", "a\r\nb", "\r", "\t", "'", "\\", "{}", "[1]"),
    *("é", "e\u0301", "日本語", "😀", "\u2028", "\x85", "\x1c"),
)
CELLS = st.sampled_from(GUESSED) | st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8
)
# A mark at the beginning of a file is no part of the first name.
NAMES = st.lists(CELLS, min_size=1, max_size=4, unique=True).filter(lambda names: not names[0].startswith("\ufeff"))
SCALARS = CELLS | st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(CELLS, inner, max_size=3))
QUICK = settings(max_examples=80, deadline=None)


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    yield
    datasets.config.HF_DATASETS_CACHE = before


def rows_of(path):
    return list(load_examples(str(path), "train"))


def read_back(name, text):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(text.encode())
        return rows_of(path)


@st.composite
def tables(draw, cells=CELLS):
    names = draw(NAMES)
    return names, draw(st.lists(st.lists(cells, min_size=len(names), max_size=len(names)), min_size=1, max_size=4))


@QUICK
@given(tables(), st.sampled_from([(csv.QUOTE_MINIMAL, "\r\n"), (csv.QUOTE_ALL, "\r\n"), (csv.QUOTE_ALL, "\n")]))
def test_a_cell_of_a_csv_file_is_the_text_that_was_written(table, form):
    names, rows = table
    quoting, newline = form
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, quoting=quoting, lineterminator=newline).writerows([names, *rows])
        assert rows_of(path) == [dict(zip(names, row, strict=True)) for row in rows]


@pytest.mark.slow
@QUICK
@given(tables(VALUES), st.booleans(), st.sampled_from(["lines", "list", "indented list"]))
def test_a_value_of_a_json_file_has_the_type_that_was_written(table, ascii_only, form):
    names, values = table
    rows = [dict(zip(names, row, strict=True)) for row in values]
    if form == "lines":
        text = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)
    else:
        text = json.dumps(rows, ensure_ascii=ascii_only, indent=2 if form == "indented list" else None)
    read = read_back("rows.jsonl" if form == "lines" else "rows.json", text)
    assert repr(read) == repr(rows)  # True equals 1, and 1 equals 1.0


def test_a_column_keeps_its_types_where_they_change_late():
    rows = [{"value": i} for i in range(2003)] + [{"value": cell, "late": 1.5} for cell in GUESSED]
    read = read_back("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert [row["value"] for row in read] == [row["value"] for row in rows]
    assert [row["late"] for row in read] == [None] * 2003 + [1.5] * len(GUESSED)


@settings(max_examples=30, deadline=None)
@given(
    st.text(st.sampled_from("[]*?{}!-~#%&;:@+=,' ab1é"), min_size=1, max_size=12).filter(lambda name: name.strip("."))
)
def test_a_path_is_a_path_and_no_pattern(name):
    with tempfile.TemporaryDirectory() as folder:
        for decoy in ("a", "b", "1", "ab", "a1"):
            (Path(folder) / f"{decoy}.jsonl").write_text('{"text": "another file"}\n')
        inner = Path(folder) / f"{name} folder"
        inner.mkdir()
        for path in (Path(folder) / f"{name}.jsonl", inner / f"{name}.jsonl"):
            path.write_text('{"text": "this file"}\n')
            assert rows_of(path) == [{"text": "this file"}]


def test_a_home_folder_and_a_suffix_in_capitals(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.CSV").write_text("text\nhello\n")
    assert rows_of("~/rows.CSV") == [{"text": "hello"}]


def test_a_changed_file_is_read_again_even_with_the_same_time(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text\none\n")
    before = path.stat()
    assert rows_of(path) == [{"text": "one"}]
    path.write_text("text\ntwo\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert rows_of(path) == [{"text": "two"}]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize(
    ("name", "text"), [("t.csv", "text,n\né\u2028,01\n"), ("t.jsonl", '{"text": "é\u2028", "n": "01"}\n')]
)
def test_encodings_with_a_byte_order_mark(encoding, name, text, tmp_path):
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert rows_of(tmp_path / name) == [{"text": "é\u2028", "n": "01"}]


def test_a_parquet_file_of_pandas(tmp_path):
    frame = pandas.DataFrame(
        {
            "text": ["NA", "01"],
            "kind": pandas.Categorical(["b", "a"]),
            "day": [date(2020, 1, 2)] * 2,
            "n": [2**53 + 1, 1],
        }
    )
    frame.to_parquet(tmp_path / "t[1].parquet")
    assert rows_of(tmp_path / "t[1].parquet") == [
        {"text": "NA", "kind": "b", "day": date(2020, 1, 2), "n": 2**53 + 1},
        {"text": "01", "kind": "a", "day": date(2020, 1, 2), "n": 1},
    ]


def test_blank_lines_are_no_rows(tmp_path):
    (tmp_path / "t.csv").write_text("text,label\na,b\n\n\n")
    (tmp_path / "t.jsonl").write_text('\n{"text": "a"}\n\n{"text": "b"}\n\n')
    assert rows_of(tmp_path / "t.csv") == [{"text": "a", "label": "b"}]
    assert rows_of(tmp_path / "t.jsonl") == [{"text": "a"}, {"text": "b"}]


def test_what_is_made_of_examples_keeps_their_json(tmp_path):
    rows = [{"m": [{"a": 1.2345678901234e-12}]}, {"m": {"b": None}}, {"m": "5"}, {"m": 10**30}, {"m": None}]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = load_examples(str(path), "train")
    mapped = examples.map(lambda row: {"k": 1}).filter(lambda row: True).select(range(5))
    assert repr(list(mapped.select_columns(["m"]))) == repr(rows)
    in_memory = datasets.Dataset(examples.with_format("arrow")[:5], info=examples.info)
    assert repr(list(in_memory)) == repr(rows)


FAULTS = {
    "a comma too many in each row": ("t.csv", b"text,label\na,b,\nc,d,\n", "row 1 (line 2) has 3 values"),
    "a comma too many in one row": ("t.csv", b'text,label\n"a\nb",c\nd,e,f\n', "row 2 (line 4) has 3 values"),
    "a value missing": ("t.csv", b"text,label\na,b\nc\n", "row 2 (line 3) has 1 values"),
    "a blank row": ("t.csv", b"text\na\n\nb\n", "row 2 (line 3) is blank"),
    "a name twice": ("t.csv", b"text,label,text\na,b,c\n", "column 'text' twice"),
    "text after a quote": ("t.csv", b'text,label\n"a"b,c\n', "row 1 (line 2)"),
    "a carriage return without quotes": ("t.csv", b"text\na\nb\rc\n", "row 2 (line 3)"),
    "an open quote": ("t.csv", b'text,label\na,b\n"c,d\ne,f\n', "row 2 (line 4)"),
    "latin-1": ("t.csv", b"text,label\na,b\n\xe9,b\n", "line 3 is not UTF-8"),
    "utf-16 without a mark": ("t.jsonl", '{"text": "é"}\n'.encode("utf-16-le"), "line 1"),
    "half a character": ("t.jsonl", b'{"text": "a"}\n{"text": "\\ud83d"}\n', "row 2: column 'text'"),
    "a key twice": ("t.jsonl", b'{"text": "a"}\n{"text": "a", "text": "b"}\n', "line 2: the key 'text' is there twice"),
    "a key twice within": (
        "t.jsonl",
        b'{"m": [{"role": "a", "role": "b"}]}\n',
        "line 1: the key 'role' is there twice",
    ),
    "a line cut short": ("t.jsonl", b'{"text": "a"}\n\n{"text": "b\n', "line 3, column"),
    "two rows in a line": ("t.jsonl", b'{"text": "a"} {"text": "b"}\n', "line 1, column"),
    "a list in a line": ("t.jsonl", b'{"text": "a"}\n["b"]\n', "line 2 is ['b'], not an object"),
    "a text in a list": ("t.json", b'[{"text": "a"}, "b"]', "row 2 is 'b', not an object"),
    "an error in a list": ("t.json", b'[{"text": "a"},\n {"text": b}]', "line 2, column"),
    "nested too deeply": ("t.jsonl", b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "nested"),
    "only a header": ("t.csv", b"text,label\n", "no data"),
    "nothing but white space": ("t.jsonl", b"\n \n", "no data"),
    "another format": ("t.txt", b"text\n", "must end in"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_can_not_be_read_is_named(fault, tmp_path):
    name, content, named = FAULTS[fault]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_examples(str(path), "train")
    assert repr(str(path)) in str(caught.value)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["absent.csv", "~nobody-of-this-name/t.csv", "a\0b.csv", "a" * 5000 + ".csv", "folder", "."]
)
def test_what_is_no_file_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"does not exist|not the name of a file"):
        load_examples(name, "train")
