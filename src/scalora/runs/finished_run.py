"""`FinishedRun`: a run folder or a checkpoint in it, with its settings and the models that belong to it."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path

import torch
from peft import prepare_model_for_kbit_training
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE

from scalora.rivals.method import Method
from scalora.runs.data import Examples, examples_of, label_names
from scalora.runs.errors import InputError
from scalora.runs.models import Source, class_names, load_base, load_tokenizer, resolve_source
from scalora.runs.settings import method_class, run_settings
from scalora.runs.streams import Stream
from scalora.runs.tasks import WITH_HEAD
from scalora.runs.unfinished import how_to_go_on
from scalora.saving.checkpoints import WRITTEN_LAST
from scalora.saving.state_file import holds_state


class FinishedRun:
    """The settings of a run, and the folders of its results.

    Args:
        path: a run folder, a checkpoint in its folder ``trainer``, or its folder ``delta``.
        base: where to load the base from, if not from where the run did.

    Attributes:
        path: the path given.
        folder: the run folder.
        settings: the settings of the run.
        method: the class of its method.
        is_checkpoint: whether the path is that of a checkpoint.
        state: folder with the exact state of a ScaLoRA run; None if there is none.
        adapter: folder with an ordinary adapter that is the total update; None if there is none.
        model: folder with the merged model; None if there is none.

    Raises:
        InputError: there is no such folder, or it contains no config of a run.
    """

    def __init__(self, path: Path, base: str | None = None) -> None:
        if not path.is_dir():
            raise InputError(f"run {str(path)!r} does not exist")
        self.path = path
        self.is_checkpoint = not (path / "config.yaml").is_file() and (path / WRITTEN_LAST).is_file()
        is_state = holds_state(path)
        # A checkpoint lies in RUN/trainer, the state in RUN/delta. Other folders do not belong to a run above them.
        above = path.resolve().parents[:2] if self.is_checkpoint or is_state else ()
        self.folder = next((f for f in (path, *above) if (f / "config.yaml").is_file()), path)
        self.settings = run_settings(self.folder)
        if base is not None:
            self.settings = self.settings.model_copy(update={"model": base})
        self.method: type[Method] = method_class(self.settings)
        state = path if is_state else path / "delta"
        adapter, model = (path if self.is_checkpoint else self.folder / name for name in ("adapter", "model"))
        self.state = state if holds_state(state) else None
        # For other methods, the adapter in a checkpoint is not the total update.
        self.adapter = adapter if self.method.ordinary_adapter and (adapter / "adapter_config.json").is_file() else None
        self.model = model if (model / "config.json").is_file() else None

    @property
    def step(self) -> int:
        """The number of steps taken, from the file that is written last.

        Raises:
            InputError: the run is not finished, or the file can't be read.
        """
        path, name, key = self.folder, "summary.json", "steps"
        if self.is_checkpoint:
            path, name, key = self.path, WRITTEN_LAST, "global_step"
        try:
            return int(json.loads((path / name).read_text(encoding="utf-8"))[key])
        except FileNotFoundError:
            raise InputError(f"run {str(path)!r}: {how_to_go_on(path)}") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{str(path / name)!r} can't be read: {error}") from None

    @cached_property
    def source(self) -> Source:
        """Where to load the base model from.

        Raises:
            InputError: the base model does not exist.
        """
        return resolve_source(self.settings.model)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the run, which training may have given a chat template and an end token.

        Raises:
            InputError: the tokenizer can't be read.
        """
        saved = [self.path] if self.is_checkpoint else [self.folder / name for name in ("model", "delta", "adapter")]
        folder = next((folder for folder in saved if (folder / TOKENIZER_CONFIG_FILE).is_file()), None)
        return load_tokenizer(Source(str(folder), None) if folder else self.source, self.settings)

    @cached_property
    def labels(self) -> list[str] | None:
        """The names of the classes in order, from the saved model or the training data; None for other tasks.

        Raises:
            InputError: the training data can't be read.
        """
        if self.settings.task != "classification":
            return None
        saved = self.model or self.folder / "model"
        if (saved / "config.json").is_file():
            return class_names(Source(str(saved), None), self.settings)
        return label_names(*self.examples(), self.settings.data)

    def examples(self) -> Examples:
        """The training data; of a stream, the first examples.

        Raises:
            InputError: the data can't be read.
        """
        if self.settings.data.train is None:
            raise InputError("data.train is missing from the config of the run")
        if self.settings.data.streaming:
            return Stream(self.settings.data, self.settings.task, seed=0).head()
        return examples_of(self.settings.data, self.settings.data.train, "train")

    def load(self, source: Source | None = None) -> PreTrainedModel:
        """Load a model with the task, dtype and quantisation of the run.

        Args:
            source: where to load the model from. None: the base model.

        Raises:
            InputError: the model can't be loaded.
        """
        model = load_base(source or self.source, self.settings, self.tokenizer, self.labels)
        if self.settings.task in WITH_HEAD and self.settings.quantization is not None:  # as in training
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        return model

    def load_merged(self, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
        """Load an exported model, whose head must be in the files.

        Args:
            folder: the folder of the model.
            dtype: dtype of its weights.

        Raises:
            InputError: the model can't be loaded.
        """
        settings = self.settings.model_copy(update={"quantization": None, "dtype": str(dtype).removeprefix("torch.")})
        return load_base(Source(str(folder), None), settings, self.tokenizer, self.labels, new_head=False)
