"""`scalora report`, through the command and from a notebook: the right numbers, in one page that needs nothing else."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

from scalora.cli import app
from scalora.report.charts import RUN_CHARTS, STUDY_CHARTS
from scalora.report.figures import (
    column_share_by_steps,
    factors,
    final_metric,
    layer_heat_map,
    learning_rate_sensitivity,
    loss_by_seconds,
    loss_by_steps,
    memory_and_speed,
    oracle_distance,
    rank_by_steps,
    run_loss,
    run_rank,
    run_spectrum,
    scaling_shares,
)
from scalora.report.summaries import NoData, final_spectra, mean_ranks
from scalora.report.tables import html_from_markdown, table_of
from scalora.report.write import read_run, read_study

METHODS = (
    "lora",
    "lora r=32",
    "full",
    "rslora",
    "dora",
    "pissa",
    "relora",
    "mora",
    "hira",
    "scalora",
    "scalora-I <10>",
)
RATES = (5e-4, 1e-3, 2e-3)
SEEDS = (1, 2, 3)
STEPS = 240
EVALUATED = range(24, STEPS + 1, 24)
LAYERS = [f"encoder.layer.{block}.{kind}" for block in range(6) for kind in ("query", "key", "value", "dense")]


def command(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def eval_loss(method, rate, seed, step):
    """What a cell's log says; the best rate is the middle one, except for full fine-tuning."""
    place = METHODS.index(method)
    best = 5e-4 if method == "full" else 1e-3
    noise = np.random.default_rng([place, seed, step, round(rate * 1e4)]).normal() * 0.004
    return 0.4 + 0.01 * place + 0.3 * np.exp(-step / 60) + 0.03 * np.log2(rate / best) ** 2 + noise


def training_loss(method, seed, step):
    noise = np.random.default_rng([METHODS.index(method), seed, step]).normal()
    return 0.3 + 0.01 * METHODS.index(method) + 0.4 * np.exp(-step / 80) + 0.05 * noise


def rank(method, seed, step, layer):
    return 4 + (step // 12 + seed + layer if "scalora" in method else 0)


def spectrum(layer):
    return [10 ** (-place / (6 + 2 * layer)) for place in range(64)]


def scaling_log(step):
    share = 0.7 + 0.1 * np.sin(step / 40)
    log = {"column_share": share, "scalar_share": 0.9 - share, "left_alone_share": 0.1}
    for factor, middle in (("alpha", 1 + 2 * np.exp(-step / 30)), ("beta", 1 - 0.5 * np.exp(-step / 50))):
        log |= {f"{factor}_p10": middle / 1.5, f"{factor}_p50": middle, f"{factor}_p90": middle * 1.5}
    return {f"scalora/{name}": float(value) for name, value in log.items()}


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_run(folder, method="scalora", rate=1e-3, seed=1, inspected=True, tracked=True):
    """A run folder as `scalora train` leaves it."""
    folder.mkdir(parents=True)
    seconds = 0.05 + 0.01 * METHODS.index(method)
    settings = {"model": "somewhere/model", "method": "scalora" if "scalora" in method else "lora"}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    logs = []
    for step in range(6, STEPS + 1, 6):
        log = {"step": step, "seconds": seconds * step, "loss": training_loss(method, seed, step)}
        logs.append(log | (scaling_log(step) if "scalora" in method else {}))
        if step in EVALUATED:
            loss = float(eval_loss(method, rate, seed, step))
            logs.append({"step": step, "seconds": seconds * step, "eval_loss": loss, "eval_accuracy": 1 - loss / 2})
    write_lines(folder / "metrics.jsonl", logs)
    if tracked:
        lines = [
            {
                "step": step,
                "layer": LAYERS[layer],
                "numerical_rank": rank(method, seed, step, layer),
                "effective_rank": 0.6 * rank(method, seed, step, layer),
                "norm": 0.1 * step,
                "singular_values": [0.01 * step * value for value in spectrum(place)],
            }
            for step in range(24, STEPS + 1, 24)
            for place, layer in enumerate((0, 8, 16, 23))
        ]
        write_lines(folder / "updates.jsonl", lines)
    summary = {
        "steps": STEPS,
        "training_seconds": seconds * STEPS,
        "seconds_per_step": seconds,
        "peak_memory_bytes": (500 + 40 * METHODS.index(method)) * 2**20,
        "trainable_parameters": 81920,
        "measuring_seconds": 0.004 * seconds * STEPS,
        "adapter_rank": 8,
        "eval_loss": logs[-1]["eval_loss"],
        "eval_accuracy": logs[-1]["eval_accuracy"],
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    if inspected:
        layers = [
            {
                "name": name,
                "shape": [384, 384],
                "numerical_rank": 10 + 2 * place,
                "effective_rank": 5.5 + place,
                "norm": 1 + 0.2 * place,
                "singular_values": [1.0, 0.5],
                "residual": {
                    "none": 0.99 + 0.1 * place,
                    "scalar": 0.95,
                    "column": 0.9 - 0.01 * place,
                    "polar": 0.85 - 0.01 * place,
                    "matrix": 0.84 - 0.01 * place,
                    "chosen": 0.95 if place % 5 == 0 else 0.9 - 0.01 * place,
                    "oracle": 0.3 + 0.01 * (place % 7),
                },
            }
            for place, name in enumerate(LAYERS)
        ]
        (folder / "inspect.json").write_text(json.dumps({"layers": layers, "step": STEPS}))
    return folder


def write_study(folder, methods=METHODS, **of_runs):
    """A study folder as `scalora compare` leaves it."""
    folder.mkdir()
    study = {
        "output_dir": str(folder),
        "metric": "eval_accuracy",
        "greater_is_better": True,
        "baseline": methods[0],
        "seeds": list(SEEDS),
        "learning_rates": list(RATES),
        "run": {"model": "somewhere/model", "task": "classification", "data": {"train": "a.jsonl", "eval": "b.jsonl"}},
        "methods": {name: {"method": "scalora" if "scalora" in name else "lora"} for name in methods},
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    from scalora.studies.study import study_of

    for cell in study_of(folder).tuning_cells():
        write_run(cell.folder, cell.method, cell.learning_rate, cell.seed, inspected=False, **of_runs)
    return folder


@pytest.fixture(scope="module")
def study_folder(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("study") / "polarity")


@pytest.fixture(scope="module")
def study(study_folder):
    return read_study(study_folder)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="module")
def run(run_folder):
    return read_run(run_folder)


def line(axes, label):
    (found,) = (line for line in axes.get_lines() if line.get_label() == label)
    return found


def over_seeds(function, *places):
    """Mean and standard error, as written down here."""
    values = np.array([[function(seed, place) for place in places] for seed in SEEDS])
    return values.mean(0), values.std(0, ddof=1) / np.sqrt(len(SEEDS))


@pytest.mark.slow
def test_evaluation_loss_is_the_mean_over_seeds_at_the_best_rate(study):
    axes = loss_by_steps(study).axes[0]
    for method, rate in (("lora", 1e-3), ("full", 5e-4), ("scalora", 1e-3)):
        mean, _ = over_seeds(lambda seed, step, m=method, r=rate: eval_loss(m, r, seed, step), *EVALUATED)
        assert list(line(axes, method).get_xdata()) == list(EVALUATED)
        np.testing.assert_allclose(line(axes, method).get_ydata(), mean)


def test_the_band_is_one_standard_error(study):
    band = loss_by_steps(study).axes[0].collections[0].get_paths()[0].vertices
    mean, error = over_seeds(lambda seed, step: eval_loss("lora", 1e-3, seed, step), *EVALUATED)
    at_the_end = band[band[:, 0] == STEPS][:, 1]
    np.testing.assert_allclose([at_the_end.min(), at_the_end.max()], [mean[-1] - error[-1], mean[-1] + error[-1]])


def test_loss_against_time_is_at_the_seconds_of_training(study):
    drawn = line(loss_by_seconds(study).axes[0], "full")
    np.testing.assert_allclose(drawn.get_xdata(), 0.07 * np.array(EVALUATED))


def test_training_loss_is_a_running_mean(study):
    # Of 40 logged losses a tenth is 4: the mean of each, the two before it and the one after it.
    losses, _ = over_seeds(lambda seed, step: training_loss("mora", seed, step), *range(6, STEPS + 1, 6))
    means = [losses[max(0, place - 2) : place + 2].mean() for place in range(40)]
    drawn = line(loss_by_steps(study, "loss").axes[0], "mora").get_ydata()
    np.testing.assert_allclose(drawn, means)


def test_sensitivity_has_every_rate_and_rings_the_best(study):
    axes = learning_rate_sensitivity(study).axes[0]
    drawn = {c.get_label(): c.lines[0] for c in axes.containers}
    expected = [np.mean([eval_loss("dora", rate, seed, STEPS) for seed in SEEDS]) for rate in RATES]
    np.testing.assert_allclose(drawn["dora"].get_ydata().astype(float), expected)
    assert list(line(axes, "reported").get_xdata()) == [5e-4 if method == "full" else 1e-3 for method in METHODS]


def test_sensitivity_compares_rates_on_the_same_seeds(study):
    without = study.cells[~((study.cells["seed"] == 3) & (study.cells["learning_rate"] != 1e-3))]
    axes = learning_rate_sensitivity(type(study)(**vars(study) | {"cells": without})).axes[0]
    drawn = {c.get_label(): c.lines[0] for c in axes.containers}
    expected = [np.mean([eval_loss("dora", rate, seed, STEPS) for seed in (1, 2)]) for rate in RATES]
    np.testing.assert_allclose(drawn["dora"].get_ydata().astype(float), expected)


def test_a_diverged_rate_does_not_flatten_the_others(study):
    cells = study.cells.copy()
    cells.loc[(cells["method"] == "mora") & (cells["learning_rate"] == 2e-3), "eval_loss"] = 900.0
    axes = learning_rate_sensitivity(type(study)(**vars(study) | {"cells": cells})).axes[0]
    assert axes.get_ylim()[1] < 2


def test_many_learning_rates_have_ticks_that_do_not_touch(study):
    rows = [
        {"method": "lora", "learning_rate": rate, "seed": 1, "eval_loss": 0.5}
        for rate in (1e-4, 1.05e-4, 2e-4, 4e-4, 4.1e-4, 1e-3)
    ]
    axes = learning_rate_sensitivity(type(study)(**vars(study) | {"cells": pd.DataFrame(rows)})).axes[0]
    assert list(axes.get_xticks()) == [1e-4, 2e-4, 4e-4, 1e-3]


def test_rank_is_the_mean_over_layers_and_seeds(study):
    numerical, effective = rank_by_steps(study).axes
    expected = [np.mean([rank("scalora", s, step, k) for s in SEEDS for k in (0, 8, 16, 23)]) for step in EVALUATED]
    np.testing.assert_allclose(line(numerical, "scalora").get_ydata(), expected)
    np.testing.assert_allclose(line(effective, "scalora").get_ydata(), 0.6 * np.array(expected))
    assert set(line(numerical, "lora").get_ydata()) == {4}


def test_column_share_is_that_of_the_methods_that_rescale(study):
    axes = column_share_by_steps(study).axes[0]
    assert {drawn.get_label() for drawn in axes.get_lines()} == {"scalora", "scalora-I <10>"}
    np.testing.assert_allclose(line(axes, "scalora").get_ydata()[0], 0.7 + 0.1 * np.sin(6 / 40))


def test_memory_and_speed_have_their_units(study):
    memory, speed = memory_and_speed(study).axes
    np.testing.assert_allclose([bar.get_width() for bar in memory.patches], [500 + 40 * i for i in range(11)])
    np.testing.assert_allclose([bar.get_width() for bar in speed.patches], [50 + 10 * i for i in range(11)])


def test_final_metric_has_the_best_method_on_top(study):
    axes = final_metric(study).axes[0]
    accuracy = {
        method: np.mean([1 - eval_loss(method, study.best[method], seed, STEPS) / 2 for seed in SEEDS])
        for method in METHODS
    }
    best_first = sorted(METHODS, key=lambda method: -accuracy[method])
    assert [tick.get_text() for tick in axes.get_yticklabels()] == best_first
    drawn = [container.lines[0].get_xdata()[0] for container in axes.containers]
    np.testing.assert_allclose(drawn, [accuracy[method] for method in best_first])
    assert axes.yaxis_inverted()


def test_final_metric_that_is_a_loss_has_the_smallest_on_top(study):
    losses = type(study)(**vars(study) | {"metric": "eval_loss", "greater_is_better": False})
    assert final_metric(losses).axes[0].get_yticklabels()[0].get_text() == "lora"


def test_a_method_looks_the_same_in_every_figure(study):
    def looks(axes):
        drawn = line(axes, "scalora")
        return drawn.get_color(), drawn.get_marker(), drawn.get_linestyle()

    assert looks(loss_by_steps(study).axes[0]) == looks(rank_by_steps(study).axes[0])
    assert looks(loss_by_steps(study).axes[0]) == looks(column_share_by_steps(study).axes[0])


def test_no_two_methods_look_the_same(study):
    drawn = loss_by_steps(study).axes[0].get_lines()
    assert len({(one.get_color(), one.get_marker()) for one in drawn}) == len(METHODS)


def test_a_run_shows_its_losses(run):
    axes = run_loss(run).axes[0]
    np.testing.assert_allclose(
        line(axes, "training").get_ydata(), [training_loss("scalora", 1, step) for step in range(6, STEPS + 1, 6)]
    )
    np.testing.assert_allclose(
        line(axes, "evaluation").get_ydata(), [eval_loss("scalora", 1e-3, 1, step) for step in EVALUATED]
    )


def test_a_loss_that_begins_high_begins_inside_the_frame(run):
    metrics = pd.DataFrame({"step": range(9), "loss": [3.2, 0.8, 0.33, 0.31, 0.3, 0.2, 0.15, 0.12, 900.0]})
    axes = run_loss(type(run)(metrics, run.updates, run.layers)).axes[0]
    assert 3.2 <= axes.get_ylim()[1] < 10


def test_a_run_shows_the_mean_rank_and_its_spread(run):
    axes = run_rank(run).axes[0]
    ranks = [[rank("scalora", 1, step, layer) for layer in (0, 8, 16, 23)] for step in EVALUATED]
    np.testing.assert_allclose(line(axes, "numerical rank").get_ydata(), np.mean(ranks, axis=1))
    band = axes.collections[0].get_paths()[0].vertices
    assert set(band[band[:, 0] == STEPS][:, 1]) == {min(ranks[-1]), max(ranks[-1])}


def test_a_run_shows_the_spectra_at_its_end_and_the_rank_of_its_adapter(run):
    axes = run_spectrum(run).axes[0]
    seen = [value for value in spectrum(1) if value >= 1e-5]
    assert len(seen) < 64
    drawn = line(axes, "2.query")  # encoder.layer.2.query without what all four have in common
    np.testing.assert_allclose(drawn.get_ydata(), seen)
    np.testing.assert_allclose(drawn.get_xdata(), range(1, len(seen) + 1))
    assert set(line(axes, "a thousandth").get_ydata()) == {1e-3}
    assert set(line(axes, "rank of the adapter").get_xdata()) == {8}
    assert set(line(run_rank(run).axes[0], "rank of the adapter").get_ydata()) == {8}


def test_shares_of_a_run_stack_up_to_all_layers(run):
    layers = scaling_shares(run).axes[0].collections
    assert [layer.get_label() for layer in layers] == ["column", "scalar", "left alone"]
    np.testing.assert_allclose(layers[-1].get_paths()[0].vertices[:, 1].max(), 1)
    np.testing.assert_allclose(layers[0].get_paths()[0].vertices[:, 1].max(), 0.8, atol=1e-3)


def test_shares_of_a_run_by_matrices(tmp_path):
    write_run(tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    logs = [json.loads(line) for line in path.read_text().splitlines()]
    for log in logs:
        if "scalora/column_share" in log:
            log["scalora/matrix_share"] = log.pop("scalora/column_share") + log.pop("scalora/scalar_share")
    write_lines(path, logs)
    run = read_run(tmp_path / "run")
    layers = scaling_shares(run).axes[0].collections
    assert [layer.get_label() for layer in layers] == ["matrix", "left alone"]
    np.testing.assert_allclose(layers[-1].get_paths()[0].vertices[:, 1].max(), 1)
    (chart,) = (chart for chart in RUN_CHARTS if chart.name == "how-layers-were-scaled")
    assert chart.says(chart.table(run)) == "Over the run matrix from 0.9 to 0.9, left alone from 0.1 to 0.1."


def test_factors_of_a_run_are_median_and_quantiles(run):
    alpha, beta = factors(run).axes
    steps = np.arange(6, STEPS + 1, 6)
    np.testing.assert_allclose(line(alpha, "median").get_ydata(), 1 + 2 * np.exp(-steps / 30))
    np.testing.assert_allclose(line(beta, "median").get_ydata(), 1 - 0.5 * np.exp(-steps / 50))
    band = alpha.collections[0].get_paths()[0].vertices
    last = 1 + 2 * np.exp(-STEPS / 30)
    np.testing.assert_allclose(sorted(set(band[band[:, 0] == STEPS][:, 1])), [last / 1.5, last * 1.5])


@pytest.mark.parametrize(
    ("value", "of"),
    [
        ("numerical_rank", lambda i: 10 + 2 * i),
        ("effective_rank", lambda i: 5.5 + i),
        ("norm", lambda i: 1 + 0.2 * i),
    ],
)
def test_the_heat_map_has_blocks_across_and_kinds_down(run, value, of):
    axes = layer_heat_map(run, value).axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["query", "key", "value", "dense"]
    expected = np.array([[of(4 * block + kind) for block in range(6)] for kind in range(4)])
    np.testing.assert_allclose(axes.collections[0].get_array().reshape(4, 6), expected)


def test_the_distance_to_the_oracle_has_every_layer_and_scaling(run):
    axes = oracle_distance(run).axes[0]
    np.testing.assert_allclose(line(axes, "no scaling").get_xdata(), [0.99 + 0.1 * i for i in range(24)])
    np.testing.assert_allclose(line(axes, "column").get_xdata(), [0.9 - 0.01 * i for i in range(24)])
    np.testing.assert_allclose(line(axes, "polar").get_xdata(), [0.85 - 0.01 * i for i in range(24)])
    np.testing.assert_allclose(line(axes, "matrix").get_xdata(), [0.84 - 0.01 * i for i in range(24)])
    np.testing.assert_allclose(line(axes, "oracle (SVD)").get_xdata(), [0.3 + 0.01 * (i % 7) for i in range(24)])
    assert line(axes, "chosen").get_xdata()[5] == 0.95
    assert len(axes.get_yticklabels()) == 24


def relative_luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def contrast(one, other):
    low, high = sorted(relative_luminance(colour) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


class Parsed(HTMLParser):
    """The elements of a page, and what is between `open` and `close` of one of a kind."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.styles, self._in_style = [], "", False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._in_style = tag == "style"

    def handle_data(self, data):
        if self._in_style:
            self.styles += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(folder, output):
    result = command("report", folder, "--output", output)
    assert result.exit_code == 0, result.stderr
    return (output / "report.html").read_text(), result.stdout


@pytest.fixture(scope="module")
def study_output(study_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("output")
    return output, *page_of(study_folder, output)


@pytest.fixture(scope="module")
def run_output(run_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("output")
    return output, *page_of(run_folder, output)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["study_output", "run_output"])
def test_the_page_needs_nothing_from_outside(kind, request):
    _, page, _ = request.getfixturevalue(kind)
    assert not re.search(r"https?://", page)
    parsed = Parsed(page)
    assert not parsed.all("script")
    references = [
        value for _, attributes in parsed.elements for name, value in attributes.items() if name in ("href", "src")
    ]
    assert all(value.startswith(("#", "data:")) for value in references)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["study_output", "run_output"])
def test_every_id_is_there_once_and_every_reference_has_its_id(kind, request):
    _, page, _ = request.getfixturevalue(kind)
    elements = Parsed(page).elements
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    values = [value or "" for _, attributes in elements for value in attributes.values()]
    referred = {found for value in values for found in re.findall(r"url\(#([^)]+)\)", value)}
    referred |= {a["href"][1:] for _, a in elements if a.get("href", "").startswith("#")}
    referred |= {a["aria-labelledby"] for _, a in elements if "aria-labelledby" in a}
    assert referred
    assert referred <= set(ids)


@pytest.mark.parametrize(("kind", "count"), [("study_output", 9), ("run_output", 9)])
def test_every_figure_has_words_numbers_and_files(kind, count, request):
    output, page, said = request.getfixturevalue(kind)
    parsed = Parsed(page)
    drawings = parsed.all("svg")
    assert len(drawings) == len(parsed.all("figure")) == len(parsed.all("figcaption")) == count
    assert all(drawing["role"] == "img" and len(drawing["aria-label"]) > 60 for drawing in drawings)
    assert len(parsed.all("details")) == count + (2 if kind == "run_output" else 1)  # the settings, a run's summary
    for suffix, start in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        files = sorted((output / "figures").glob(f"*.{suffix}"))
        assert len(files) == count
        assert all(path.read_bytes().startswith(start) for path in files)
    assert f"with {count} figures" in said


@pytest.mark.parametrize("kind", ["study_output", "run_output"])
def test_every_table_has_a_caption_and_headings(kind, request):
    _, page, _ = request.getfixturevalue(kind)
    tables = re.findall(r'<table role="table">.*?</table>', page, re.DOTALL)
    for table in tables:
        assert re.match(r'<table role="table"><caption[^>]*>[^<]+</caption>', table)
        heads = r'<th (?:scope="col" role="columnheader"|role="columnheader" scope="col")>\s*(.*?)</th>'
        headings = re.findall(heads, table)
        assert headings
        rows = re.findall(r'<tr role="row">(.*?)</tr>', table, re.DOTALL)[1:]
        assert rows
        assert all(re.match(r'\s*<th scope="row" role="rowheader">', row) for row in rows)
        # Stacked on a phone, each cell says what it is.
        labels = [heading.replace("<wbr>", "") for heading in headings[1:]]
        assert all(re.findall(r'<td role="cell" data-label="(.*?)">', row) == labels for row in rows)
        assert table.count("<td") == len(rows) * (len(headings) - 1)
    assert len(tables) == page.count("<table")


def test_a_studys_results_are_those_of_its_table(study_output, study):
    _, page, _ = study_output
    results = page[page.index('<section id="tables"') :]
    mean, error = over_seeds(lambda seed, step: 1 - eval_loss("mora", 1e-3, seed, step) / 2, STEPS)
    row = re.search(r'<th scope="row" role="rowheader">\s*mora</th>(.*?)</tr>', results, re.DOTALL)[1]
    assert f"{mean[0]:.4f} ± {error[0]:.4f}" in row


def test_names_are_text_and_never_markup(study_output):
    _, page, _ = study_output
    assert "scalora-I &lt;10&gt;" in page
    assert "<10>" not in re.sub(r"aria-label=\"[^\"]*\"", "", page)


def test_every_text_and_line_can_be_told_from_the_page(study_output):
    _, page, _ = study_output
    light, dark = Parsed(page).styles.split("prefers-color-scheme: dark", 1)
    for scheme in (light, dark.split("* {")[0]):
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", scheme))
        for name in ("ink", "quiet", "accent"):
            assert contrast(colours[name], colours["page"]) >= 4.5
        series = [colour for name, colour in colours.items() if name.startswith("series")]
        assert len(series) == 8
        assert min(contrast(colour, colours["page"]) for colour in series) >= 3


def test_figures_use_the_colours_of_the_page(study_output):
    _, page, _ = study_output
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    for drawing in drawings:
        assert set(re.findall(r"#[0-9a-f]{6}\b", drawing)) == set()
        assert "currentColor" in drawing


@pytest.mark.slow
def test_the_same_data_gives_the_same_bytes(tmp_path):
    folder = write_run(tmp_path / "run", method="lora", inspected=False)
    once, _ = page_of(folder, tmp_path / "once")
    again, _ = page_of(folder, tmp_path / "again")
    assert again == once
    written = sorted((tmp_path / "once" / "figures").iterdir())
    assert len(written) == 6
    assert all((tmp_path / "again" / "figures" / path.name).read_bytes() == path.read_bytes() for path in written)


@pytest.mark.slow
def test_the_report_lands_in_the_folder_and_replaces_an_earlier_one(tmp_path):
    folder = write_run(tmp_path / "run", method="lora", tracked=False)
    assert command("report", folder).exit_code == 0
    assert (folder / "figures" / "distance-to-the-oracle.png").is_file()
    (folder / "inspect.json").unlink()
    assert command("report", folder).exit_code == 0
    assert not (folder / "figures" / "distance-to-the-oracle.png").exists()
    assert (folder / "figures" / "loss.png").is_file()
    assert not list(folder.glob(".*"))


def test_what_a_run_lacks_is_said_with_the_command_that_gives_it(tmp_path):
    folder = write_run(tmp_path / "run", method="lora", inspected=False, tracked=False)
    page, said = page_of(folder, tmp_path / "output")
    for text in (page, said):
        assert "scalora inspect RUN" in text
        assert "track_updates: 0" in text
        assert "scalora train" in text
        assert "method: scalora" in text
        for title in ("Distance to the oracle", "Spectrum of the total update at the end", "Scaling factors"):
            assert title in text
    assert "<code>scalora inspect RUN</code>" in page
    parsed = Parsed(page)
    assert len(parsed.all("figure")) == 1
    assert len(list((tmp_path / "output" / "figures").iterdir())) == 2
    # Nothing stands in place of the others: one line for each reason, at the end of the page.
    assert len([attributes for attributes in parsed.all("section") if "aria-labelledby" in attributes]) == 1
    assert page.index("Distance to the oracle") > page.index("<pre>")
    assert said.count("left out: ") == page[page.index("Not shown</h2>") :].count("<p>") == 3


def test_a_run_that_was_measured_only_at_its_end_shows_its_spectrum(tmp_path):
    folder = write_run(tmp_path / "run", method="lora", inspected=False)
    path = folder / "updates.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[-4:]))
    page, said = page_of(folder, tmp_path / "output")
    assert (tmp_path / "output" / "figures" / "spectrum-of-the-update.png").is_file()
    assert not (tmp_path / "output" / "figures" / "rank-of-the-update.png").exists()
    assert "Rank of the total update: the run was measured only at its end" in said
    assert "track_updates: 20" in page


@pytest.mark.slow
def test_what_a_study_lacks_is_said_with_the_command_that_gives_it(tmp_path):
    folder = write_study(tmp_path / "study", methods=("lora", "dora"), tracked=False)
    page, said = page_of(folder, tmp_path / "output")
    for text in (page, said):
        assert "track_updates: 0" in text
        assert "scalora compare" in text
        assert "no finished run has rescaled columns" in text


def test_a_study_without_a_finished_run_is_a_page_without_figures(tmp_path):
    folder = write_study(tmp_path / "study", methods=("lora", "scalora"))
    for summary in folder.glob("cells/*/*/summary.json"):
        summary.unlink()
    page, said = page_of(folder, tmp_path / "output")
    assert not Parsed(page).all("figure")
    assert "<h2>Figures" not in page
    left_out = [line for line in said.splitlines() if line.startswith("left out: ")]
    assert len([chart for chart in STUDY_CHARTS if any(chart.title in line for line in left_out)]) == 9
    assert "No method has a finished run" in page


def test_a_seed_that_failed_leaves_the_others(tmp_path):
    folder = write_study(tmp_path / "study", methods=("lora", "scalora"))
    for summary in folder.glob("cells/scalora/*seed3/summary.json"):
        summary.unlink()
    drawn = line(loss_by_steps(read_study(folder)).axes[0], "lora").get_ydata()
    np.testing.assert_allclose(drawn[-1], np.mean([eval_loss("lora", 1e-3, seed, STEPS) for seed in SEEDS]))


def facts_of(page):
    """What the page begins with: value and note of each fact."""
    found = re.findall(
        r'<dt>(.*?)</dt><dd class="value">(.*?)</dd>(?:<dd class="note">(.*?)</dd>)?', page[: page.index("<h2>")]
    )
    return {label: (value, note) for label, value, note in found}


def test_a_runs_page_begins_with_what_it_reached_and_what_it_cost(run_output):
    _, page, _ = run_output
    facts = facts_of(page)
    first, last = (training_loss("scalora", 1, step) for step in (6, STEPS))
    assert facts["Training loss"] == (f"{first:.4g} → {last:.4g}", "first → last")
    first, last = (eval_loss("scalora", 1e-3, 1, step) for step in (24, STEPS))
    assert facts["Evaluation loss"] == (f"{first:.4g} → {last:.4g}", "first → last")
    assert facts["Evaluation accuracy"][0] == f"{1 - first / 2:.1%} → {1 - last / 2:.1%}"
    ranks = sorted(rank("scalora", 1, STEPS, layer) for layer in (0, 8, 16, 23))
    note = f"from an adapter of rank 8; median of 4 layers, {ranks[0]} to {ranks[-1]}"
    assert facts["Rank of the update"] == (str(ranks[1]), note)
    assert facts["Training time"][0] == "33.6 s"
    assert facts["Time per step"] == ("140 ms", "median")
    assert facts["Peak memory"][0] == "860 MiB"
    assert facts["Trainable parameters"][0] == "81,920"
    assert "scalora on somewhere/model, sft, 240 steps" in page


@pytest.mark.slow
def test_an_unfinished_run_has_the_facts_that_there_are(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "summary.json").unlink()
    page, _ = page_of(folder, tmp_path / "output")
    assert set(facts_of(page)) == {"Training loss", "Evaluation loss", "Evaluation accuracy", "Rank of the update"}
    assert "not finished" in page[: page.index("<h2>")]


def verdict_of(tmp_path, scores, baseline="lora", seeds=SEEDS):
    """What the page of a study says of the final accuracies of some methods, a list over seeds each."""
    folder = write_study(tmp_path / "study", methods=tuple(scores), tracked=False)
    study_file = folder / "study.yaml"
    content = yaml.safe_load(study_file.read_text()) | {"seeds": list(seeds), "baseline": baseline}
    study_file.write_text(yaml.safe_dump(content, sort_keys=False))
    from scalora.studies.study import study_of

    for cell in study_of(folder).tuning_cells():
        path = cell.folder / "summary.json"
        accuracy = scores[cell.method][SEEDS.index(cell.seed)]
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eval_accuracy": accuracy}))
    page, _ = page_of(folder, tmp_path / "output")
    return re.search(r'<p class="verdict">(.*?)</p>', page)[1], facts_of(page)


LORA = [0.70, 0.71, 0.72]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scores", "says"),
    [
        (
            {"lora": LORA, "scalora": [0.80, 0.811, 0.822]},
            [
                "scalora reaches the highest eval_accuracy: 0.8110 ± 0.0064.",
                "+0.10100 ± 0.00058",
                "more than noise (p =",
            ],
        ),
        ({"lora": LORA, "scalora": [0.66, 0.75, 0.78]}, ["scalora reaches", "level within noise (p = 0.5"]),
        # Significant alone, but not among four comparisons.
        (
            {"lora": LORA, "dora": [0.71, 0.732, 0.736], "pissa": LORA, "mora": LORA, "hira": [0.6, 0.5, 0.4]},
            ["dora reaches", "level within noise (p = 0.044, but 0.18 corrected for 4 comparisons)"],
        ),
        (
            {"lora": LORA, "dora": [0.80, 0.811, 0.822], "pissa": LORA},
            ["dora reaches", "more than noise (p = 3.3e-05, 6.5e-05 corrected for 2 comparisons)"],
        ),
        (
            {"lora": LORA, "scalora": [0.6, 0.5, 0.66]},
            ["lora reaches", "It is the baseline. The next is scalora: -0.12"],
        ),
        ({"lora": LORA, "scalora": [0.75, 0.76, 0.77]}, ["+0.05", "the same on every seed, which gives no p value"]),
    ],
)
def test_a_study_says_what_is_best_and_whether_it_is_more_than_noise(scores, says, tmp_path):
    verdict, facts = verdict_of(tmp_path, scores)
    for text in says:
        assert text in verdict
    best = verdict.split(" reaches")[0]
    assert facts["Best method"][0] == best
    assert ("Against lora" in facts) == (best != "lora")


@pytest.mark.slow
def test_a_study_of_one_seed_has_no_noise_to_compare_with(tmp_path):
    verdict, facts = verdict_of(tmp_path, {"lora": LORA, "scalora": [0.8, 0.8, 0.8]}, seeds=[1])
    assert "+0.1, from one seed, which can&#39;t be told from noise." in verdict
    assert facts["Against lora"][0] == "+0.1"


@pytest.mark.slow
def test_a_studys_facts_compare_the_costs_with_the_baselines(tmp_path):
    _, facts = verdict_of(tmp_path, {"lora": LORA, "scalora": [0.80, 0.81, 0.83]})
    assert facts["Time per step"] == ("140 ms", "lora: 50 ms")
    assert facts["Peak memory"] == ("860 MiB", "lora: 500 MiB")


def test_ranks_of_a_study_are_at_steps_that_all_seeds_have(study):
    # Runs that choose when to measure have some steps of their own.
    extra = study.updates[(study.updates["seed"] == 1) & (study.updates["step"] == 24)].assign(step=30)
    updates = pd.concat([study.updates, extra])
    found = mean_ranks(type(study)(**vars(study) | {"updates": updates}))
    pd.testing.assert_frame_equal(found, mean_ranks(study))


def test_a_table_merges_what_belongs_together():
    frame = pd.DataFrame(
        {
            "step": [1, 2],
            "rank_mean": [3.25, 4.0],
            "rank_min": [1, 2],
            "rank_max": [5, 6],
            "mean": [0.5, 0.25],
            "standard_error": [0.1, float("nan")],
            "alpha_p10": [1.0, 1.5],
            "alpha_p50": [2.0, 2.5],
            "alpha_p90": [3.0, 3.5],
        }
    )
    table = table_of(frame, "A < B")
    headings = re.findall(r'columnheader">(.*?)</th>', table)
    assert headings == ["step", "rank: mean (range)", "mean ± standard error", "alpha: median (10–90 %)"]
    cells = re.findall(r'<td role="cell" data-label="[^"]*">(.*?)</td>', table)
    assert cells == ["3.25 (1 to 5)", "0.50 ± 0.10", "2 (1 to 3)", "4 (2 to 6)", "0.25", "2.5 (1.5 to 3.5)"]
    assert '<caption class="said">A &lt; B</caption>' in table
    assert "wide" not in table


@pytest.mark.parametrize(("columns", "width"), [(4, "fit"), (5, "fit middle"), (6, "fit wide")])
def test_a_table_says_how_much_room_it_needs(columns, width):
    rows = "\n".join("|" + f" {cell} |" * columns for cell in ("a", "---", "1"))
    frame = pd.DataFrame([range(columns)], columns=list("abcdef")[:columns])
    assert f'<div class="{width}"><table' in html_from_markdown(rows)
    assert f'<div class="{width}"><table' in table_of(frame, "t")


def test_a_figure_without_data_says_so_in_a_notebook(tmp_path):
    with pytest.raises(NoData, match="scalora inspect"):
        layer_heat_map(read_run(write_run(tmp_path / "run", inspected=False)))
    with pytest.raises(NoData, match="track_updates"):
        final_spectra(read_run(write_run(tmp_path / "untracked", tracked=False)))


def damaged(tmp_path, name, content):
    folder = write_run(tmp_path / "run")
    (folder / name).write_text(content)
    return folder


def damaged_study(tmp_path):
    folder = write_study(tmp_path / "study", methods=("lora", "scalora"))
    next(folder.glob("cells/*/*/summary.json")).write_text('{"eval_loss": 0.4')
    return folder


def others_figures(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "figures").mkdir()
    (folder / "figures" / "mine.png").write_bytes(b"")
    return folder


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: path / "nowhere", "nowhere"),
        (lambda path: path, "study.yaml nor config.yaml"),
        (lambda path: damaged(path, "config.yaml", "model: [1"), "config.yaml"),
        (lambda path: damaged(path, "inspect.json", '{"layers": ['), "inspect.json"),
        (lambda path: damaged(path, "inspect.json", "[]"), "inspect.json"),
        (lambda path: damaged(path, "inspect.json", '{"layers": 3}'), "can't be read"),
        (lambda path: damaged(path, "summary.json", "x"), "summary.json"),
        (lambda path: damaged(path, "metrics.jsonl", '{"loss": 1.0}\n'), "metrics.jsonl"),
        (damaged_study, "scalora compare"),
        (others_figures, "mine.png"),
    ],
)
def test_bad_input_is_one_line_that_names_it(make, says, tmp_path):
    folder = make(tmp_path)
    result = command("report", folder)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert says in result.stderr
    assert not (folder / "report.html").exists()
