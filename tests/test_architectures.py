"""Every line of docs/models.md: a tiny model of each architecture is trained, saved, loaded and exported as it says."""

from pathlib import Path

import pytest
import torch
from architecture_trials import trained_and_shipped, trained_and_shipped_with_block_signs, tried_by_peft
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from scalora.maths.lowrank import factors_of_dense, rank_for_tolerance

# Their arguments are checked where the functions themselves are tested.
pytestmark = pytest.mark.usefixtures("without_shape_checks")

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
LINES = [
    tuple(cell.strip() for cell in line.strip("|\n").split("|"))
    for line in PAGE.read_text(encoding="utf-8").splitlines()
    if line.startswith("| ")
][2:]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "head", "adapted", "dense", "factored"), LINES, ids=[line[0] for line in LINES])
@pytest.mark.filterwarnings("ignore")
def test_an_architecture_is_trained_and_shipped_or_refused_as_the_page_says(kind, head, adapted, dense, factored):
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this version of Transformers has no {kind}")
    base, batch, targets = tried_by_peft(kind, head)
    assert (targets == "all-linear") == (adapted == "all-linear")
    for merge, expected in (("dense", dense), ("factored", factored)):
        refusal = trained_and_shipped(base, batch, targets, merge)
        assert refusal is None if expected == "yes" else expected in refusal, f"{merge}: {refusal}"


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "head"), [line[:2] for line in LINES[::5]], ids=[line[0] for line in LINES[::5]])
@pytest.mark.filterwarnings("ignore")
def test_block_signs_on_every_fifth_architecture(kind, head):
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this version of Transformers has no {kind}")
    trained_and_shipped_with_block_signs(*tried_by_peft(kind, head))


def test_the_page_has_more_architectures_than_anyone_would_list_by_hand():
    assert len(LINES) >= 150
    assert len({kind for kind, *_ in LINES}) == len(LINES)
    assert sum(line[3:] == ("yes", "yes") for line in LINES) >= 0.9 * len(LINES)


def test_a_layer_that_never_had_a_gradient_has_an_update_of_rank_zero():
    nothing = factors_of_dense(torch.zeros(6, 4), rtol=1e-3, max_rank=4)
    assert rank_for_tolerance(nothing.truncated(0), 1e-3) == 0
