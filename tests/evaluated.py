"""What the tests of scores share: small causal models with tokenizers of several kinds, and settings for them."""

import torch
from models import tiny_llama
from tokenizers import Tokenizer, processors
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from scalora.runs.settings import Settings

BOS, END = "<bos>", "<end>"


def variant(tokenizer, kind="plain"):
    """A tokenizer like the given one, which begins (and ends) texts, or whose chat template does.

    The kinds are "plain", "begins", "begins and ends" and "template begins". All know the tokens <bos> and <end>.
    """
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.add_special_tokens([BOS, END])
    special = [(token, backend.token_to_id(token)) for token in (BOS, "<eos>")]
    pattern = {"begins": f"{BOS} $A", "begins and ends": f"{BOS} $A <eos>"}.get(kind)
    if pattern is not None:
        backend.post_processor = processors.TemplateProcessing(single=pattern, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        bos_token=BOS,
        chat_template=(BOS if kind == "template begins" else "") + tokenizer.chat_template,
        model_max_length=64,
    )


def model_for(tokenizer, kind="llama", **settings):
    """A random model, whose answers differ from prompt to prompt."""
    common = {
        "vocab_size": len(tokenizer),
        "initializer_range": 0.2,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    if kind == "llama":
        return tiny_llama(**common, **settings).eval()
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **common, **settings)).eval()


def settings(training=None, data=None, task="sft", **evaluate):
    return Settings.model_validate(
        {"model": "unused", "task": task, "training": training or {}, "data": data or {}, "evaluate": evaluate}
    )
