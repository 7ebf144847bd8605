"""`exact_match`: from the tokens of training, by the model's own end tokens, whatever the batch."""

import re

import pytest
import torch
from conftest import WORDS
from datasets import Dataset
from evaluated import BOS, END, model_for, settings, variant
from trl import SFTConfig, SFTTrainer

from scalora.runs.errors import InputError
from scalora.runs.exact_match import exact_match_score

PROMPTS = [f"say: {' '.join(WORDS[i : i + 1 + i % 4])}" for i in range(7)]


def score(model, tokenizer, rows, training=None, **evaluate):
    evaluate = {"metrics": ["exact_match"], "max_new_tokens": 5} | evaluate
    return exact_match_score(model, tokenizer, Dataset.from_list(rows), "data", settings(training, **evaluate))


def conversation(prompt, answer):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


FORMS = {
    "texts": lambda p, a: {"prompt": p, "completion": a},
    "messages": lambda p, a: {"messages": conversation(p, a)},
    "prompts of messages": lambda p, a: {"prompt": conversation(p, a)[:1], "completion": conversation(p, a)[1:]},
}


@torch.no_grad()
def own_answer(model, tokens, length=5, **options):
    """What the model generates after a prompt alone."""
    given = torch.tensor([tokens])
    output = model.generate(
        given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=length,
        do_sample=False,
        num_beams=1,
        max_length=None,
        **options,
    )
    return output[0, len(tokens) :].tolist()


def text_before_end(model, tokenizer, tokens):
    """Make the model end its answer to a prompt with <end>, after some text, which is returned."""
    answer = own_answer(model, tokens)
    end = next(
        i
        for i in range(1, len(answer))
        if answer[i] not in answer[:i] and tokenizer.decode(answer[:i], skip_special_tokens=True).strip()
    )
    rows = [answer[end], tokenizer.convert_tokens_to_ids(END)]
    model.lm_head.weight.data[rows] = model.lm_head.weight.data[rows[::-1]]
    return tokenizer.decode(answer[:end], skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["plain", "begins", "begins and ends", "template begins"])
@pytest.mark.parametrize("form", FORMS)
def test_the_model_answers_the_tokens_that_it_was_trained_on(form, kind, tokenizer, monkeypatch, tmp_path):
    tokenizer = variant(tokenizer, kind)
    model = model_for(tokenizer)
    rows = [FORMS[form](prompt, " red") for prompt in PROMPTS]
    seen = []

    def generate(self, input_ids, **options):
        seen.extend(input_ids.tolist())
        return input_ids

    monkeypatch.setattr(type(model), "generate", generate)
    score(model, tokenizer, rows, batch_size=2)
    arguments = SFTConfig(output_dir=str(tmp_path), report_to="none", bf16=False, use_cpu=True)
    trainer = SFTTrainer(model, arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trained = trainer.train_dataset["input_ids"]
    answer = tokenizer(" red", add_special_tokens=False)["input_ids"]
    expected = []
    for ids in trained:
        start = next(i for i in reversed(range(len(ids))) if ids[i : i + len(answer)] == answer)
        expected.append(ids[:start])
    assert sorted(seen) == sorted(expected)
    begun = kind.startswith("begins") if form == "texts" else kind == "template begins"
    assert [ids.count(tokenizer.bos_token_id) for ids in seen] == [int(begun)] * len(PROMPTS)


def test_a_text_that_begins_with_the_token_does_not_get_it_twice(tokenizer):
    tokenizer = variant(tokenizer, "begins")
    model = model_for(tokenizer)
    rows = []
    for prompt in PROMPTS:
        answer = own_answer(model, tokenizer(prompt)["input_ids"], eos_token_id=tokenizer.eos_token_id)
        rows.append({"prompt": BOS + prompt, "completion": tokenizer.decode(answer, skip_special_tokens=True) or "-"})
    assert score(model, tokenizer, rows)["exact_match"] == 1


@pytest.mark.parametrize("where", ["generation config, of two", "generation config", "tokenizer"])
def test_every_end_token_ends_an_answer(where, tokenizer):
    tokenizer = variant(tokenizer)
    model = model_for(tokenizer)
    model.generation_config.eos_token_id = None
    rows = [{"prompt": PROMPTS[0], "completion": text_before_end(model, tokenizer, tokenizer(PROMPTS[0])["input_ids"])}]
    assert score(model, tokenizer, rows)["exact_match_unfinished"] == 1
    end = tokenizer.convert_tokens_to_ids(END)
    if where == "tokenizer":
        tokenizer.eos_token = END
        model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<eos>")
    else:
        model.generation_config.eos_token_id = end if where == "generation config" else [tokenizer.unk_token_id, end]
    for written in ("", END):
        found = score(model, tokenizer, [row | {"completion": row["completion"] + written} for row in rows])
        assert (found["exact_match"], found["exact_match_unfinished"]) == (1, 0)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_answers_are_greedy_and_the_models_own_whatever_the_batch(kind, tokenizer):
    tokenizer = variant(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token  # so that a penalty on padding would be one on ending
    model = model_for(tokenizer, kind)
    model.generation_config.update(
        do_sample=True, temperature=3.0, num_beams=3, max_length=6, repetition_penalty=1.7, no_repeat_ngram_size=2
    )
    rows = []
    for prompt in PROMPTS:
        answer = own_answer(model, tokenizer(prompt)["input_ids"], pad_token_id=tokenizer.pad_token_id)
        if (text := tokenizer.decode(answer, skip_special_tokens=True)).strip():
            rows.append({"prompt": prompt, "completion": text})
    assert len({len(tokenizer(row["prompt"])["input_ids"]) for row in rows}) > 1
    with pytest.warns(UserWarning, match=r"own repetition_penalty=1\.7, no_repeat_ngram_size=2"):
        found = [score(model, tokenizer, rows, batch_size=size)["exact_match"] for size in (1, 3, 16)]
    assert found == [1, 1, 1]
    plain = model_for(tokenizer, kind)
    assert score(plain, tokenizer, rows)["exact_match"] < 1  # the penalty matters


def test_an_answer_ends_before_a_stop_string(tokenizer):
    tokenizer = variant(tokenizer)
    model = model_for(tokenizer)
    model.generation_config.eos_token_id = None
    text = tokenizer.decode(own_answer(model, tokenizer(PROMPTS[0])["input_ids"], length=5))
    stop = next(text[i : i + 2] for i in range(1, len(text) - 1) if text.index(text[i : i + 2]) == i)
    model.generation_config.stop_strings = [stop]
    expected = text.partition(stop)[0]
    with pytest.warns(UserWarning, match="own stop_strings"):
        found = score(model, tokenizer, [{"prompt": PROMPTS[0], "completion": expected}])
    assert (found["exact_match"], found["exact_match_unfinished"]) == (1, 0)


def replies(monkeypatch, model, tokenizer, texts):
    """Make a model answer with given texts, in the order of the examples' prompts, which have one length."""
    answers = iter(texts)

    def generate(self, input_ids, **options):
        rows = [tokenizer(next(answers), add_special_tokens=False)["input_ids"] for _ in input_ids]
        width = max(map(len, rows))
        padded = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
        return torch.cat([input_ids, padded], dim=1)

    monkeypatch.setattr(type(model), "generate", generate)


@pytest.mark.parametrize(
    ("pattern", "expected", "generated", "right", "unmatched"),
    [
        (None, " red ", "red<eos> blue", 1, 0),
        (None, "red<eos>", "red<eos>", 1, 0),
        (None, "red , blue", "red , blue<eos>", 1, 0),
        (None, "red, blue", "red , blue<eos>", 0, 0),
        (None, "Red", "red<eos>", 0, 0),
        (r"\d+", "it is 12 or 13", "12 of them<eos>", 1, 0),
        (r"= (\d+)", "3 = 12", "x = 12<eos>", 1, 0),
        (r"= (\d+)", "3 = 12", "x: 12<eos>", 0, 1),
        (r"= (\d+)|none", "3 = 12", "none<eos>", 0, 1),
        (r"(\d+) of (\d+)", "1 of 5", "1 of 6<eos>", 1, 0),
    ],
)
def test_answers_are_compared_by_their_text_or_by_the_pattern(
    pattern, expected, generated, right, unmatched, tokenizer, monkeypatch
):
    tokenizer = variant(tokenizer)
    model = model_for(tokenizer)
    replies(monkeypatch, model, tokenizer, [generated])
    found = score(model, tokenizer, [{"prompt": "say: red", "completion": expected}], answer_pattern=pattern)
    assert (found["exact_match"], found["exact_match_unmatched"]) == (right, unmatched)


@pytest.mark.parametrize("pattern", [r"#### (\d+)", r"red (\d+)|blue"])
def test_an_expected_answer_without_what_the_pattern_finds_is_refused_with_its_row(pattern, tokenizer):
    tokenizer = variant(tokenizer)
    rows = [{"prompt": "say:", "completion": text} for text in ("#### 5, red 5", "blue")]
    with pytest.raises(InputError, match=rf"row 2: evaluate\.answer_pattern={re.escape(repr(pattern))}.*'blue'"):
        score(model_for(tokenizer), tokenizer, rows, answer_pattern=pattern)


def test_what_can_t_be_asked_is_left_out_and_counted(tokenizer):
    tokenizer = variant(tokenizer)
    model = model_for(tokenizer)
    rows = [
        {"prompt": "say: red", "completion": " red"},
        {"prompt": "", "completion": " red"},
        {"prompt": "say: red", "completion": " \n"},
        {"prompt": "say: red", "completion": None},
    ]
    with pytest.warns(UserWarning, match="exact_match leaves out") as caught:
        found = score(model, tokenizer, rows)
    assert found["exact_match_left_out"] == 3
    said = sorted(str(warning.message) for warning in caught)
    assert said == [
        "data 'data': exact_match leaves out 1 examples without prompt",
        "data 'data': exact_match leaves out 2 examples without expected answer",
    ]
    unanswered = [{"messages": conversation("say: red", " red")[:1]}, {"messages": conversation("say: red", " red")}]
    with pytest.warns(UserWarning, match="leaves out 1 examples without expected answer"):
        assert score(model, tokenizer, unanswered)["exact_match_left_out"] == 1
    with pytest.raises(InputError, match="nothing to score"):
        score(model, tokenizer, rows[1:])
    several = {"prompt": conversation("say:", "")[:1], "completion": conversation("red", "blue")}
    with pytest.raises(InputError, match="row 1: the completion has 2 messages"):
        score(model, tokenizer, [several])


def test_a_prompt_that_is_too_long_keeps_its_end_and_is_counted(tokenizer, monkeypatch):
    tokenizer = variant(tokenizer)
    model = model_for(tokenizer, max_position_embeddings=24)
    seen = []
    generate = type(model).generate

    def watched(self, input_ids, **options):
        seen.extend(input_ids.tolist())
        return generate(self, input_ids=input_ids, **options)

    monkeypatch.setattr(type(model), "generate", watched)
    long = "say: " + " ".join(WORDS * 3)
    with pytest.warns(UserWarning, match="only the last 16 tokens of 1 prompts"):
        found = score(model, tokenizer, [{"prompt": p, "completion": "a"} for p in ("say:", long)], max_new_tokens=8)
    assert found["exact_match_shortened"] == 1
    assert tokenizer(long)["input_ids"][-16:] in seen
    with pytest.raises(InputError, match=r"evaluate\.max_new_tokens=24 leaves no room.*24 positions"):
        score(model, tokenizer, [{"prompt": "say:", "completion": "a"}], max_new_tokens=24)


def test_the_tokens_that_training_sets_are_used(tokenizer, tmp_path):
    tokenizer = variant(tokenizer)
    model = model_for(tokenizer)
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %} it is:")
    prompt = tokenizer("say: red it is:")["input_ids"]
    model.generation_config.eos_token_id = None
    rows = [{"messages": conversation("say: red", text_before_end(model, tokenizer, prompt))}]
    training = {"chat_template_path": str(template), "eos_token": END}
    assert score(model, tokenizer, rows, training)["exact_match"] == 1
    for key, value in (("eos_token", "<nowhere>"), ("chat_template_path", "nowhere.jinja")):
        with pytest.raises(InputError, match=f"training.{key}='{value}'"):
            score(model, tokenizer, rows, {key: value})
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="row 1 is a conversation, and the tokenizer has no chat template"):
        score(model, tokenizer, rows)
