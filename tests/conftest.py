"""Small models on disk and data files, made once for each worker."""

import gc
import importlib.util
import json
import os
import shutil

import jaxtyping
import pytest
import torch
from models import tiny_llama
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

if not torch.cuda.is_available():
    # Else every process that imports DeepSpeed says on standard output that it has found no GPU.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

os.fsync = lambda descriptor: None  # a tenth of the tests' time, for files that need not outlive a power cut

torch.set_num_threads(1)  # there is a worker for each core, and tiny models gain nothing from more


def pytest_collection_finish():
    _leave_out_of_collections()


def pytest_runtest_teardown(item, nextitem):
    if nextitem is not None and nextitem.path != item.path:
        _leave_out_of_collections()


def _leave_out_of_collections():
    """Leave what the libraries have made so far out of garbage collections: every trainer starts one."""
    gc.collect()
    gc.freeze()


NO_COMPILER = shutil.which(os.environ.get("CXX", "c++")) is None

# DeepSpeed compiles an operation at its first start.
DEEPSPEED_LACKS = [
    *(["could not import 'deepspeed': it is not installed"] if importlib.util.find_spec("deepspeed") is None else []),
    *(["DeepSpeed needs a C++ compiler"] if NO_COMPILER else []),
]
needs_deepspeed = pytest.mark.skipif(bool(DEEPSPEED_LACKS), reason=" and ".join(DEEPSPEED_LACKS))

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = ["red", "blue", "green", "black", "white", "grey", "pink", "brown", "gold", "teal"]


def pairs(count):
    """Prompts that name a word, and the word."""
    return [{"prompt": f"say: {WORDS[i % 10]} {WORDS[i % 7]}", "completion": f" {WORDS[i % 7]}"} for i in range(count)]


@pytest.fixture
def without_shape_checks():
    """As users run the library: for its own errors about shapes, and for torch.compile, which traces calls."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def tokenizer():
    tokenizer = Tokenizer(BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<pad>", "<eos>", "<|user|>", "<|assistant|>"]
    corpus = [f" {word}" for word in WORDS] * 3 + ["say:", "0123456789"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        corpus, BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=64,
    )


@pytest.fixture(scope="session")
def causal_folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("causal")
    tiny_llama(vocab_size=len(tokenizer), eos_token_id=2, pad_token_id=1, initializer_range=0.2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def encoder_folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        pad_token_id=1,
    )
    torch.manual_seed(0)  # as `tiny_llama` does: not another model for each order of the tests
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def write_jsonl(tmp_path):
    def write(name, rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write
