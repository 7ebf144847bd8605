"""``scalora evaluate --harness``: scores of lm-evaluation-harness (lm_eval), from its Python API."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

from scalora._version import __version__
from scalora.parallel.job import join
from scalora.parallel.processes import process_count
from scalora.runs.errors import InputError
from scalora.runs.harness_settings import FOR_MODEL, HarnessSettings
from scalora.runs.kept import RESULTS_FILE, check_folder
from scalora.runs.messages import without_message
from scalora.runs.run_folder import replace_text, write_json
from scalora.runs.scored_model import Scored, load_scored
from scalora.runs.settings import Settings

_PACKAGES = ("lm_eval", "transformers", "torch", "peft")  # what else a figure depends on

# That the harness is given a model and not a name.
_MEANT = ("`pretrained` model kwarg is not of type `str`", "Passed an already-initialized model through `pretrained`")

_OWN = frozenset({"tasks", "include_path", "batch_size"})  # what isn't passed on as it is


def harness_scores(
    model: str, settings: Settings, harness: HarnessSettings, output: Path | None = None
) -> dict[str, Any]:
    """Score a model on tasks of lm-evaluation-harness.

    The harness gets the loaded model and its tokenizer, so that it scores just the weights that are named.

    Args:
        model: run folder, checkpoint, model folder, folder of an ordinary adapter, GGUF file or hub id.
        settings: the config, of which ``dtype``, ``quantization``, ``trust_remote_code``, ``evaluate.batch_size``
            and the device and tokens of ``training`` matter.
        harness: what is scored, and how.
        output: folder for the results and the outputs for each example, which is created. Answers are kept there as
            they are made, and an evaluation that is killed goes on from them. None: nothing is written.

    Returns:
        What the harness returns, without the outputs, as JSON: ``"results"`` has the scores by task. Besides
        ``"weights"``, which identifies the weights scored, and the versions of ``"packages"``.

    Raises:
        InputError: lm_eval is not installed, a task is unknown, the model can't be loaded, several processes are to
            share the work, or `output` holds something else.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("--harness needs lm-evaluation-harness: pip install 'scalora[harness]'")
    join(use_cpu=bool(settings.training.get("use_cpu", False)))
    if process_count() > 1:
        raise InputError(
            "--harness runs in one process: on several GPUs, give the merged model to the harness's own command "
            "(accelerate launch -m lm_eval)"
        )
    if output is not None:
        check_folder(output, {"weights", "results"})
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=harness.include_path)
    tasks = _tasks(harness.task_names, manager)
    scored = load_scored(model, settings)
    scored.place(settings)
    batch_size = harness.batch_size or settings.evaluate.batch_size
    with ExitStack() as quiet:
        for message in _MEANT:
            quiet.enter_context(without_message("lm_eval.models.huggingface", message))
        lm = HFLM(
            pretrained=scored.model,
            tokenizer=scored.tokenizer,
            batch_size=batch_size,
            trust_remote_code=settings.trust_remote_code,
            **harness.given(FOR_MODEL),
        )
    cache = None
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        cache = output / f"unfinished-{_identity(scored, settings, harness)}"
    try:
        found = simple_evaluate(
            model=lm,
            tasks=tasks,
            batch_size=batch_size,
            task_manager=manager,
            use_cache=None if cache is None else str(cache),
            **harness.given(frozenset(type(harness).model_fields) - FOR_MODEL - _OWN),
        )
    finally:
        if lm.cache_hook.dbdict is not None:
            lm.cache_hook.dbdict.close()
    samples = found.pop("samples", {})
    result: dict[str, Any] = {
        "weights": scored.weights,
        "packages": {"scalora": __version__} | {package: version(package) for package in _PACKAGES},
        **_as_json(found),
    }
    if output is not None and cache is not None:
        for task, rows in samples.items():
            lines = (json.dumps(_as_json(row), ensure_ascii=False) + "\n" for row in rows)
            replace_text(output / f"samples_{task}.jsonl", "".join(lines))
        write_json(output / RESULTS_FILE, result)
        for part in output.glob(f"{cache.name}_rank*.db*"):
            part.unlink()
    return result


def _tasks(names: list[str], manager: Any) -> list[str]:
    """The tasks that names and patterns stand for, as the harness's own command finds them."""
    found: dict[str, None] = {}
    for name in names:
        matching = [name] if name.endswith(".yaml") and Path(name).is_file() else manager.match_tasks([name])
        if not matching:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "`lm_eval ls tasks` lists those of the harness"
            raise InputError(f"--harness tasks: there is no task {name!r}: {hint} (include_path adds your own)")
        found |= dict.fromkeys(matching)
    return list(found)


def _identity(scored: Scored, settings: Settings, harness: HarnessSettings) -> str:
    """What answers depend on besides the request itself, by which the harness finds those that it has kept.

    The sizes of batches are left out: they change answers by rounding errors alone.
    """
    tokenizer = scored.tokenizer
    parts = [
        scored.identity(settings),
        [tokenizer.name_or_path, len(tokenizer), tokenizer.chat_template],
        harness.given(FOR_MODEL - {"max_batch_size"}),
        version("lm_eval"),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _as_json(value: Any) -> Any:
    """What the harness returns as plain data, in the way that it writes such data itself."""
    from lm_eval.utils import handle_non_serializable

    return json.loads(json.dumps(value, default=handle_non_serializable))
