"""The fields of the libraries' dataclasses, read from source, against `dataclasses.fields` of the imported classes."""

import dataclasses
import importlib
import inspect
import textwrap

import pytest
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType

from scalora.rivals import METHODS, home_of
from scalora.runs import library_fields
from scalora.runs.field_values import converted
from scalora.runs.library_fields import UNKNOWN, dataclass_fields, named_values

CLASSES = [
    ("peft", "LoraConfig"),
    ("trl", "SFTConfig"),
    ("transformers", "TrainingArguments"),
    ("scalora.config", "ScaLoraConfig"),
    *sorted({home_of(method) for method in METHODS}),
]


@pytest.fixture
def read(monkeypatch):
    """Reads fields from source, and fails where that is not possible."""

    def refuse(module):
        raise AssertionError(f"{module} was imported")

    monkeypatch.setattr(library_fields, "import_module", refuse)
    return dataclass_fields.__wrapped__


VALUES = ("no", "true", "3", "1e-3", "auto", 3, 0.5, True, None, ["a"], {"a": 1})


def outcome(value, annotation):
    """What a value becomes under an annotation, or what is said against it."""
    try:
        return converted(value, annotation)
    except ValueError as error:
        return str(error).replace("typing.", "")


def real_default(field):
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


@pytest.mark.parametrize(("module", "name"), CLASSES)
def test_the_source_gives_the_fields_of_the_class(module, name, read):
    fields = read(module, name)
    real = {field.name: field for field in dataclasses.fields(getattr(importlib.import_module(module), name))}
    assert list(fields) == list(real)
    for key, field in fields.items():
        annotation = real[key].type
        text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
        for value in VALUES:
            kept, real_kept = (outcome(value, written) for written in (field.annotation, text))
            assert type(kept) is type(real_kept), key
            if not isinstance(kept, str) or isinstance(value, str):
                assert kept == real_kept, key
        if field.default is not UNKNOWN:
            assert field.default == real_default(real[key]), key
        if help_text := real[key].metadata.get("help"):
            assert field.help == " ".join(help_text.split()), key
        assert field.help or key == "config"


@pytest.mark.parametrize(("module", "name"), CLASSES[:4])
def test_importing_the_class_gives_the_same(module, name):
    read, imported = dataclass_fields(module, name), library_fields._imported_fields(module, name)
    assert list(read) == list(imported)
    for key, field in read.items():
        assert (field.help, field.module) == (imported[key].help, imported[key].module)
        for value in ("no", "3", 3):
            assert type(outcome(value, field.annotation)) is type(outcome(value, imported[key].annotation)), key
        assert field.default in (UNKNOWN, imported[key].default)


def test_most_defaults_and_helps_are_known():
    for module, name in CLASSES[:3]:
        fields = dataclass_fields(module, name).values()
        assert sum(field.default is UNKNOWN for field in fields) <= 1
        assert all(field.help for field in fields)


def test_the_values_of_enumerations_and_aliases():
    training = dataclass_fields("trl", "SFTConfig")
    for key, values in {
        "eval_strategy": IntervalStrategy,
        "save_strategy": SaveStrategy,
        "lr_scheduler_type": SchedulerType,
    }.items():
        assert named_values(training[key]) == tuple(member.value for member in values)
    assert named_values(training["learning_rate"]) == ()
    assert named_values(training["report_to"]) == ()
    assert named_values(dataclass_fields("scalora.config", "ScaLoraConfig")["merge"]) == (
        "auto",
        "dense",
        "dense_8bit",
        "stochastic",
        "factored",
    )
    assert named_values(dataclass_fields("scalora.config", "ScaLoraConfig")["mode"]) == (
        "auto",
        "column",
        "scalar",
        "matrix",
    )


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Makes a package of files, which is imported and read under a name of its own."""
    monkeypatch.syspath_prepend(tmp_path)
    count = iter(range(100))

    def make(**files):
        name = f"invented_{tmp_path.name.replace('-', '_')}_{next(count)}"
        (tmp_path / name).mkdir()
        for file, text in {"__init__": "", **files}.items():
            (tmp_path / name / f"{file}.py").write_text(textwrap.dedent(text).replace("PACKAGE", name))
        importlib.invalidate_caches()
        return name

    return make


PLAIN = """
from dataclasses import dataclass, field
from .base import Base as Parent

@dataclass
class Config(Parent):
    '''A config.

    Args:
        width (`int`, *optional*, defaults to 3): how wide
            it is. Note: as wide as this.
        depth: how deep.
    '''

    width: int = 3
    name: "str | None" = None
    depth: float = 1e-3
    '''The text under the field goes first.'''
    layers: list[int] = field(default_factory=list)
    low: int = field(default=-1, metadata={"help": "how " "low",})
"""

BASE = """
from __future__ import annotations
from abc import ABC
import dataclasses
import typing as t
from dataclasses import InitVar, dataclass

class Nothing(ABC):
    not_a_field: int = 3

@dataclasses.dataclass(frozen=False)
class Base(Nothing, object):
    rate: float
    width: t.Optional[int] = None
    shared: t.ClassVar[int] = 3
    seed: InitVar[int] = 4
    computed: int = max(1, 2)
    switch = True

    def method(self):
        local: int = 3
        return local
"""


def test_what_plain_classes_have(package, read):
    name = package(__init__="if True:\n    from .plain import Config", plain=PLAIN, base=BASE)
    fields = read(name, "Config")
    assert {key: (field.annotation, field.default, field.help) for key, field in fields.items()} == {
        "rate": ("float", UNKNOWN, ""),
        "width": ("int", 3, "How wide it is. Note: as wide as this."),
        "computed": ("int", UNKNOWN, ""),
        "name": ("str | None", None, ""),
        "depth": ("float", 1e-3, "The text under the field goes first."),
        "layers": ("list[int]", [], ""),
        "low": ("int", -1, "how low"),
    }
    assert fields["rate"].module == f"{name}.base"
    assert fields["width"].module == f"{name}.plain"


HEAD = "from dataclasses import dataclass, make_dataclass\n@dataclass\nclass Old:\n    old: int = 1\n"

UNREADABLE = {
    "base-from-a-call": "@dataclass\nclass Config(make_dataclass('Made', ['made'])):\n    new: int = 2\n",
    "base-by-a-dotted-name": "import PACKAGE.base\n@dataclass\nclass Config(PACKAGE.base.Base):\n    new: int = 2\n",
    "base-by-a-star": "from .base import *\n@dataclass\nclass Config(Base):\n    new: int = 2\n",
    "generic-base": "from typing import Generic, TypeVar\nT = TypeVar('T')\n"
    "@dataclass\nclass Config(Old, Generic[T]):\n    new: int = 2\n",
    "base-defined-twice": "class Old(Old):\n    pass\n@dataclass\nclass Config(Old):\n    new: int = 2\n",
    "field-on-a-condition": "@dataclass\nclass Config(Old):\n    if True:\n        new: int = 2\n",
    "another-decorator": "def also(cls):\n    cls.__annotations__['more'] = int\n    return dataclass(cls)\n"
    "@also\nclass Config(Old):\n    new: int = 2\n    more = 3\n",
    "assigned": "Config = make_dataclass('Config', [('new', int, 2)], bases=(Old,))\n",
    "assigned-again": "class Config(Old):\n    new: int = 2\nConfig = dataclass(Config)\n",
    "defined-in-two-places": "try:\n    from .missing import Config\nexcept ImportError:\n    Config = Old\n",
    "from-two-places": "try:\n    from .missing import Config\nexcept ImportError:\n    from .other import Config\n",
    "through-a-module-attribute": "def __getattr__(name):\n    if name == 'Config':\n        return Old\n"
    "    raise AttributeError(name)\n",
    "compiled-name": "globals()['Config'] = Old\n",
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_cant_be_followed_is_imported(kind, package, monkeypatch):
    imported = []
    monkeypatch.setattr(
        library_fields, "import_module", lambda name: imported.append(name) or importlib.import_module(name)
    )
    name = package(__init__=HEAD + UNREADABLE[kind], base=BASE, other=HEAD + "Config = Old\n")
    fields = dataclass_fields(name, "Config")
    assert imported == [name]
    real = dataclasses.fields(importlib.import_module(name).Config)
    assert list(fields) == [field.name for field in real]
    assert all(
        field.annotation in ("int", "float", "t.Optional[int]", "typing.Any", "Any") for field in fields.values()
    )


def test_a_single_file_module_is_imported(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "invented_file.py").write_text(HEAD)
    assert list(dataclass_fields("invented_file", "Old")) == ["old"]


def test_a_package_that_is_not_installed():
    with pytest.raises(ImportError, match="not_installed"):
        dataclass_fields("not_installed", "Config")
