import random
import re
from pathlib import Path

import jaxtyping
import pytest
import torch
from beartype.roar import BeartypeCallHintViolation
from shape_checks import checked

import scalora
from scalora.maths.scaling import grams

SOURCE = Path(scalora.__file__).parent


def test_all_modules_that_annotate_shapes_are_checked(pytestconfig):
    *packages, checker = pytestconfig.getoption("--jaxtyping-packages").split(",")
    assert checker == "shape_checks.checked"
    files = [
        file for file in SOURCE.rglob("*.py") if re.search(r"^from jaxtyping import", file.read_text(), re.MULTILINE)
    ]
    assert len(files) > 20
    for file in files:
        module = ".".join(["scalora", *file.relative_to(SOURCE).with_suffix("").parts])
        assert any(f"{module}.".startswith(f"{package}.") for package in packages), (
            f"{module} is missing in pyproject.toml"
        )


def test_a_wrong_shape_is_seen():
    with pytest.raises(jaxtyping.TypeCheckError):
        grams(torch.zeros(3, 2), torch.zeros(4, 2), torch.zeros(5, 2), torch.zeros(4, 2))


def of_lists(numbers: list[int]): ...


def of_numbers(number: int): ...


@pytest.mark.parametrize(("function", "right", "wrong"), [(of_lists, [1, 2], ["1"]), (of_numbers, 1, "1")])
def test_checks_draw_no_random_number(function, right, wrong):
    state = random.getstate()
    checked(function)(right)
    assert random.getstate() == state
    with pytest.raises(BeartypeCallHintViolation):
        checked(function)(wrong)
