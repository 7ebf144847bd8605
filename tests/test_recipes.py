"""The recipes that write data and a model for studies of capacity, and the study files: offline, at a small size."""

import importlib
import json
import math
import sys
import sysconfig
from collections import Counter, defaultdict
from itertools import islice
from pathlib import Path
from random import Random

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from scalora.studies.study import load_study_file

RECIPES = Path(__file__).parents[1] / "recipes"
STUDIES = sorted((RECIPES / "studies").glob("*.yaml"))
sys.path.append(str(RECIPES))
facts, prose_to_code = (importlib.import_module(name) for name in ("facts", "prose_to_code"))

PROSE = "In the beginning was the word, and the word was with them. And they went out, and it was evening. " * 40
MODULE = "def {name}(value):\n    if value:\n        return {name!r}\n    return [value, 'a', \"é\"]\n\n\n" * 30


def write(module, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["recipe", *map(str, words)])
    module.main()


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_name_is_learned_in_every_template_and_asked_for_in_another(tmp_path, monkeypatch, capsys):
    write(facts, monkeypatch, tmp_path, "--facts", 50, "--classes", 8)
    number = dict(facts.facts(50, 8))
    seen = defaultdict(Counter)
    for row in rows(tmp_path / "train.jsonl"):
        (name,) = number.keys() & set(row["text"].strip(".?").split())
        assert row["label"] == number[name]
        seen[row["text"].replace(name, "{}")][name] += 1
    assert len(seen) == 12
    assert all(names == dict.fromkeys(number, 1) for names in seen.values())
    asked = rows(tmp_path / "eval.jsonl")
    assert {row["text"].rstrip(".?").rsplit(" ", 1)[1]: row["label"] for row in asked} == number
    assert not seen.keys() & {" ".join([*row["text"].split()[:-1], "{}" + row["text"][-1]]) for row in asked}
    assert "50 facts of 8 classes (150 bits): 600 training rows, 50 evaluation rows" in capsys.readouterr().out


def test_a_language_model_gets_the_same_facts_as_prompts_and_completions(tmp_path, monkeypatch):
    write(facts, monkeypatch, tmp_path / "labels", "--facts", 30, "--eval", 10)
    write(facts, monkeypatch, tmp_path / "completions", "--facts", 30, "--eval", 10, "--completion")
    for split, size in (("train", 360), ("eval", 10)):
        labels, completions = (rows(tmp_path / form / f"{split}.jsonl") for form in ("labels", "completions"))
        assert len(labels) == size
        assert completions == [{"prompt": f"{row['text']} Number:", "completion": f" {row['label']}"} for row in labels]


def test_a_longer_list_of_facts_begins_with_the_shorter_one():
    many = facts.facts(64_000, 32)
    assert facts.facts(1600, 32) == many[:1600]
    assert len({name for name, _ in many}) == 64_000
    assert all(name.isalpha() and name.istitle() for name, _ in many)
    # Each number is drawn 2,000 times, with a standard deviation of 44.
    times = Counter(number for _, number in many)
    assert times.keys() == set(range(32))
    assert max(abs(count - 2000) for count in times.values()) < 200


def test_names_are_the_same_for_the_same_seed_only():
    first, again, other = (list(islice(facts.names(Random(seed)), 20)) for seed in (0, 0, 1))
    assert first == again
    assert not set(first) & set(other)


@pytest.mark.parametrize(
    ("words", "reason"), [(["--facts", "700000"], "from 1 to 614125"), (["--classes", "1"], "at least 2")]
)
def test_more_facts_than_names_or_one_class_is_refused(words, reason, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        write(facts, monkeypatch, tmp_path / "out", *words)
    assert f"{' '.join(words)}: must be {reason}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A standard library of 40 modules, and files in it that are no part of the data."""
    folder = tmp_path / "library"
    for index in range(40):
        module = folder / f"package{index % 3}" / f"module{index}.py"
        module.parent.mkdir(parents=True, exist_ok=True)
        module.write_text(MODULE.format(name=f"function{index}"), encoding="utf-8")
    for left_out in ("test", "site-packages/numpy", "email/tests"):
        module = folder / left_out / "module.py"
        module.parent.mkdir(parents=True)
        module.write_text("left_out = 1\n" * 50)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(folder)})
    monkeypatch.setattr(prose_to_code, "prose", lambda: PROSE)
    monkeypatch.setattr(prose_to_code, "_PROSE", 3)
    return folder


@pytest.mark.slow
def test_a_model_is_pretrained_on_prose_and_written_with_code_to_learn(library, tmp_path, monkeypatch):
    out = tmp_path / "out"
    write(prose_to_code, monkeypatch, out, "--steps", 30)
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    tokens = tokenizer(PROSE, return_tensors="pt", verbose=False).input_ids[:, :128]
    with torch.no_grad():
        assert model(input_ids=tokens, labels=tokens).loss < math.log(len(tokenizer)) / 2

    train, held_out = ([row["text"] for row in rows(out / f"{split}.jsonl")] for split in ("train", "eval"))
    modules = [path.read_text(encoding="utf-8") for path in library.glob("package*/*.py")]
    learned = [module for module in modules if any(piece in module for piece in train)]
    asked = [module for module in modules if any(piece in module for piece in held_out)]
    assert len(learned) == 38
    assert len(asked) == 2
    assert not set(learned) & set(asked)
    assert all(any(piece in module for module in modules) for piece in train + held_out)
    for piece in train + held_out:
        ids = tokenizer(piece).input_ids
        assert tokenizer.decode(ids) == piece
        assert len(ids) < tokenizer.model_max_length


@pytest.mark.slow
def test_a_model_pretrained_twice_is_the_same(library, tmp_path, monkeypatch):
    for folder in ("one", "two"):
        write(prose_to_code, monkeypatch, tmp_path / folder, "--steps", 2)
    files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*")]
    assert {"train.jsonl", "eval.jsonl", "model.safetensors"} <= {path.name for path in files}
    for path in files:
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes()


def test_pieces_are_whole_lines_and_together_the_source():
    tokenizer = prose_to_code.new_tokenizer([PROSE])
    source = MODULE.format(name="function") + "long = " + "'é'" * 200 + "\nlast = 1"
    pieces = list(prose_to_code.pieces(source, tokenizer))
    assert "".join(pieces) == source
    assert all(piece.endswith("\n") for piece in pieces[:-1])
    too_long = [piece for piece in pieces if len(tokenizer(piece, verbose=False).input_ids) >= 128]
    assert too_long == ["long = " + "'é'" * 200 + "\n"]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_file_is_valid(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in yaml.safe_load(path.read_text())["run"]["data"].values():
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text('{"text": "a", "label": "b"}\n')
    study = load_study_file(path)
    assert study.folder.name == path.stem
    # All learning rates of all methods, not only the first of each, which loading checks.
    assert len({str(cell.settings.output_dir) for cell in study.tuning_cells()}) == len(study.tuning_cells())


def test_cities_in_other_batches_differ_in_batches_alone():
    studies = {path.stem: yaml.safe_load(path.read_text()) for path in STUDIES if "cities" in path.stem}
    usual = studies["minilm-cities"]["run"]
    batches = {int(name.rpartition("-")[2]): study["run"] for name, study in studies.items() if "batch" in name}
    assert sorted(batches) == [8, 128, 512]
    for batch, run in batches.items():
        training = run["training"]
        assert training["per_device_train_batch_size"] == batch
        assert training["max_steps"] * batch == 240 * 32
        assert training["warmup_steps"] == pytest.approx(20 * 32 / batch, abs=0.5)
        assert training.keys() == usual["training"].keys()
        head, its_usual = float(run["head_learning_rate"]), float(usual["head_learning_rate"])
        assert head == pytest.approx(its_usual * (batch / 32) ** 0.5, rel=0.01)
        of_batch = {"training", "head_learning_rate"}
        assert {key: run[key] for key in run.keys() - of_batch} == {key: usual[key] for key in usual.keys() - of_batch}
