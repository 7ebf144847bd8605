"""The short recipes for `scalora train` on stand-ins: nothing replaced but paths and the steps."""

import json
from pathlib import Path

import pytest
import stand_ins
import trl
from transformers import Gemma3TextConfig, LlamaConfig, Qwen3Config, SmolLM3Config

from scalora.runs.dry_run import dry_run
from scalora.runs.settings import load_settings
from scalora.runs.train import train

RECIPES = Path(__file__).parents[1] / "recipes" / "today"
TEMPLATES = Path(trl.__file__).with_name("chat_templates")

MESSAGES = [
    {"role": "user", "content": "say: red blue"},
    {"role": "assistant", "content": "blue"},
]
ROW = {"prompt": "say: red blue", "prompt_id": "a", "messages": MESSAGES, "category": "Rewrite"}

# SmolLM3's own marks its answers, as this one does.
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|im_end|>\n{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# By recipe: the class of the config, the chat template, the text that is not trained on, and that which is.
CHATS = {
    "qwen3": (
        Qwen3Config,
        (TEMPLATES / "qwen3_instruct_2507.jinja").read_text(),
        "<|im_start|>user\nsay: red blue<|im_end|>\n<|im_start|>assistant\n",
        "blue<|im_end|>\n",
    ),
    "gemma3": (
        Gemma3TextConfig,
        (TEMPLATES / "gemma3.jinja").read_text(),
        "<eos><start_of_turn>user\nsay: red blue<end_of_turn>\n<start_of_turn>model\n",
        "blue<end_of_turn>\n",
    ),
    "smollm3": (
        SmolLM3Config,
        MARKED,
        "<|im_start|>user\nsay: red blue<|im_end|>\n<|im_start|>assistant\n",
        "blue<|im_end|>\n",
    ),
    "llama3.2": (LlamaConfig, (TEMPLATES / "llama3_2.jinja").read_text(), "", None),
}

SHORT = ["--training.use_cpu", "true", "--training.max_steps", "2", "--training.save_strategy", "no"]


def model_of(config, tokenizer, folder, **more):
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    tokens = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2}
    if config is Gemma3TextConfig:
        more |= {"layer_types": ["sliding_attention", "full_attention"]}
    made = config(**sizes, **heads, **tokens, max_position_embeddings=512, **more)
    return stand_ins.causal(folder, tokenizer, made)


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    folder = tmp_path_factory.mktemp("no_robots")
    return stand_ins.hub_folder(folder, {"default": {"train": ([ROW] * 6, None), "test": ([ROW] * 2, None)}})


@pytest.mark.parametrize("name", CHATS)
def test_a_recipe_for_conversations_trains_on_the_answers(name, chats, tmp_path):
    config, template, before, answer = CHATS[name]
    tokenizer = stand_ins.word_tokenizer([template, "say: red blue", "user assistant model", "<|im_start|>"])
    tokenizer.chat_template = template
    tokenizer.bos_token = "<eos>"  # which two of the templates write first
    model = model_of(config, tokenizer, tmp_path / "model")
    words = ["--model", model, "--data.train", f"{chats}@train", "--data.eval", f"{chats}@test", *SHORT]
    words = [str(word) for word in [*words, "--output_dir", tmp_path / "run"]]
    settings = load_settings(RECIPES / f"{name}.yaml", words)
    parts = dry_run(settings).shown[0].parts
    if answer is None:
        (text, trained) = parts[0]
        assert trained
        assert "<|start_header_id|>assistant<|end_header_id|>\n\nblue<|eot_id|>" in text
    else:
        assert [(text, trained) for text, trained in parts][:2] == [(before, False), (answer, True)]
    folder = train(settings)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 2
    assert "eval_loss" in summary
    assert (folder / "delta").is_dir()


def test_the_recipe_for_a_new_language_packs_texts(tmp_path):
    row = {"id": "1", "url": "u", "title": "Coch", "text": "Mae coch yn lliw. Mae glas yn lliw."}
    data = stand_ins.hub_folder(tmp_path / "wikipedia", {"20231101.cy": {"train": ([row] * 520, None)}})
    tokenizer = stand_ins.word_tokenizer([row["text"]] * 3)
    model = model_of(Qwen3Config, tokenizer, tmp_path / "model")
    words = [
        *("--model", model, "--data.train", f"{data}:20231101.cy@train[:-500]", *SHORT),
        *("--data.eval", f"{data}:20231101.cy@train[-500:]", "--training.max_length", 64),
        *("--training.eval_steps", 2, "--output_dir", tmp_path / "run"),
    ]
    settings = load_settings(RECIPES / "new_language.yaml", [str(word) for word in words])
    plan = dry_run(settings)
    assert plan.steps.batch == 16
    ids = tokenizer(row["text"])["input_ids"]
    assert plan.shown[0].tokens == 5 * (len(ids) + 1)  # as many whole texts as there is room for
    assert len(ids) + 1 == plan.lengths.shortest  # and the end token
    summary = json.loads((train(settings) / "summary.json").read_text())
    assert summary["steps"] == 2
