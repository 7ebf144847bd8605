"""Writes a merged model as ``from_pretrained`` and other libraries expect to find it."""

from __future__ import annotations

import warnings
from pathlib import Path

from transformers import PreTrainedModel

DEFAULT_SHARD_SIZE = "5GB"
"""Maximum size of a file, small enough for the file systems and caches that models pass through."""


def write_model(model: PreTrainedModel, folder: Path, *, max_shard_size: str = DEFAULT_SHARD_SIZE) -> None:
    """Write a merged model as sharded safetensors with its configs.

    Args:
        model: the merged model; its configs are corrected where they contradict it.
        folder: the folder to write to.
        max_shard_size: maximum size of each file, as in ``PreTrainedModel.save_pretrained``.

    Raises:
        OSError: a file can't be written.
    """
    _untie(model)
    make_generation_valid(model)
    model.save_pretrained(folder, max_shard_size=max_shard_size)


def _untie(model: PreTrainedModel) -> None:
    """Say that the embeddings are not tied if a head or embedding of its own has been trained (modules_to_save).

    Libraries that go by the config would take the input embedding for the head, and never read the trained one.
    """
    config = model.config.get_text_config()
    if not getattr(config, "tie_word_embeddings", False):
        return
    try:
        inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    except NotImplementedError:  # a model without them, whose config has Transformers' default
        return
    if outputs is not None and outputs.weight is not inputs.weight:
        model.config.tie_word_embeddings = config.tie_word_embeddings = False


def make_generation_valid(model: PreTrainedModel) -> None:
    """Correct a generation config that Transformers loads but refuses to save: with a temperature and no sampling.

    Args:
        model: the model, whose generation config is corrected, with a warning.

    Raises:
        ValueError: the config is invalid in another way.
    """
    generation = getattr(model, "generation_config", None)
    if generation is None:
        return
    try:
        generation.validate(strict=True)
    except ValueError as error:
        if generation.do_sample:
            raise
        generation.do_sample = True
        reason = " ".join(str(error).split())
        warnings.warn(f"the base's generation config is saved with do_sample=True: {reason}", stacklevel=2)
