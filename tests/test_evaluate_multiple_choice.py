"""`multiple_choice`, against a restatement of lm-evaluation-harness's rules with likelihoods taken token by token."""

import re

import pytest
import torch
from conftest import WORDS
from datasets import Dataset
from evaluated import BOS, model_for, settings, variant
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from scalora.runs.errors import InputError
from scalora.runs.multiple_choice import multiple_choice_score

CHOICES = [f" {word}" for word in WORDS[:4]]


def score(model, tokenizer, rows, **evaluate):
    evaluate = {"metrics": ["multiple_choice"]} | evaluate
    return multiple_choice_score(model, tokenizer, Dataset.from_list(rows), "data", settings(**evaluate))


@torch.no_grad()
def log_likelihood(model, context, continuation):
    total = 0.0
    for place, token in enumerate(continuation):
        logits = model(input_ids=torch.tensor([[*context, *continuation[:place]]])).logits[0, -1]
        total += logits.double().log_softmax(-1)[token].item()
    return total


def harness_pair(tokenizer, context, continuation):
    """Tokens of a context and a continuation as the harness makes them; the second is empty where it gives up."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    if not context:
        tokens = tokenizer(continuation, add_special_tokens=False)["input_ids"]
        begin = tokenizer.bos_token_id
        return ([begin], tokens) if tokens[0] != begin else (tokens[:1], tokens[1:])
    begun = {"add_special_tokens": False} if context.startswith(BOS) else {}
    before = tokenizer(context, **begun)["input_ids"]
    return before, tokenizer(context + continuation, **begun)["input_ids"][len(before) :]


words = st.sampled_from([*WORDS, "say:", "A", "B", "0123", "123", "", BOS, "é", "\n"])
texts = st.lists(words, max_size=4).flatmap(lambda parts: st.sampled_from([" ", "", "  "]).map(lambda s: s.join(parts)))
bordered = st.tuples(st.sampled_from(["", " ", "  ", "\n"]), texts, st.sampled_from(["", " ", "\n"])).map("".join)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "begins"])
def test_the_choice_is_the_harnesss_choice(kind, tokenizer):
    tokenizer = variant(tokenizer, kind)
    model = model_for(tokenizer)

    @hypothesis_settings(max_examples=40, deadline=None, database=None)
    @given(prompt=bordered, choices=st.lists(bordered.filter(bool), min_size=2, max_size=4, unique=True))
    def check(prompt, choices):
        pairs = [harness_pair(tokenizer, prompt, choice) for choice in choices]
        assume(all(before and after for before, after in pairs))
        found = [log_likelihood(model, before, after) for before, after in pairs]
        each = [value / len(choice) for value, choice in zip(found, choices, strict=True)]
        assume(all(abs(a - b) > 1e-3 for values in (found, each) for i, a in enumerate(values) for b in values[:i]))
        best, best_each = found.index(max(found)), each.index(max(each))
        scores = score(model, tokenizer, [{"prompt": prompt, "choices": choices, "answer": best}])
        assert (scores["multiple_choice"], scores["acc"]) == (1, 1)
        assert scores["acc_norm"] == (best == best_each)
        assert scores["multiple_choice_ties"] == 0

    check()


@pytest.mark.parametrize("prompt", ["Answer: ", "say: 012", "0123 "])
def test_a_choice_that_merges_with_its_prompt_is_scored_by_what_differs(prompt, tokenizer):
    tokenizer = variant(tokenizer)
    model = model_for(tokenizer)
    choices = ["red", "3", "3456"]
    rows = [{"prompt": prompt, "choices": choices, "answer": place} for place in range(3)]
    scores = score(model, tokenizer, rows)
    assert scores["multiple_choice_ties"] == 0
    assert scores["acc"] == scores["acc_norm"] == pytest.approx(1 / 3)


LETTERS = {"text": CHOICES, "label": ["A", "B", "C", "D"]}
NUMBERED = {"text": CHOICES, "label": ["1", "2", "3", "4"]}


@pytest.mark.parametrize(
    ("choices", "answer", "place"),
    [
        (CHOICES, 2, 2),
        (CHOICES, 2.0, 2),
        (CHOICES, CHOICES[2], 2),
        ([" C", "C", "A"], "C", 1),
        ([" 4", " 2", " 0"], " 2", 1),
        ([" 4", " 2", " 0"], 2, 2),
        (LETTERS, "C", 2),
        (LETTERS, 2, 2),
        (LETTERS, CHOICES[2], 2),
        ({"text": CHOICES}, CHOICES[2], 2),
        (NUMBERED, "3", 2),
        (NUMBERED, 4, 3),
        ({"text": [" 2", " 1", " 3"], "label": ["1", "2", "3"]}, "2", 1),
    ],
)
def test_every_form_of_an_answer_means_its_choice(choices, answer, place, tokenizer):
    tokenizer = variant(tokenizer)
    model = model_for(tokenizer)
    listed = choices["text"] if isinstance(choices, dict) else choices
    by_place = [
        score(model, tokenizer, [{"prompt": "say:", "choices": listed, "answer": i}]) for i in range(len(listed))
    ]
    best = next(i for i, found in enumerate(by_place) if found["acc"] == 1)
    found = score(model, tokenizer, [{"prompt": "say:", "choices": choices, "answer": answer}])
    assert found["acc"] == (place == best)
    assert found["acc_norm"] == by_place[place]["acc_norm"]


@pytest.mark.parametrize(
    ("choices", "answer", "named"),
    [
        (CHOICES, 4, "the answer 4 is neither the place"),
        (CHOICES, -1, "the answer -1 is neither"),
        (CHOICES, "2", "the answer '2' is neither"),
        (CHOICES, "C", "the answer 'C' is neither"),
        (CHOICES, WORDS[2], "is neither"),
        ([" A", " B"], "B", "the answer 'B' is neither"),
        (CHOICES, 1.5, "the answer 1.5 is neither"),
        (CHOICES, True, "the answer True is neither"),
        (CHOICES, None, "the answer None is neither"),
        (CHOICES, "violet", "the answer 'violet' is neither"),
        (CHOICES, "", "the answer '' is neither"),
        (CHOICES, [1], r"the answer \[1\] is neither"),
        ([" A", " C"], "B", "the answer 'B' is neither"),
        ([" 10", " 20"], "1", "the answer '1' is neither"),
        ([" red", " red"], " red", "the answer ' red' fits several"),
        (LETTERS, "E", "the answer 'E' is neither"),
        (NUMBERED, 1, "the answer 1 fits several"),
        (NUMBERED, "5", "the answer '5' is neither"),
        ([" red", ""], 0, r"the choices are .*, not texts of at least one character"),
        ([" red"], 0, "there must be at least two"),
        ([], 0, "there must be at least two"),
        ([1, 2], 0, r"the choices are \[1, 2\], not texts"),
        (" red", 0, "the choices are ' red', not texts"),
        ({"label": ["A", "B"]}, 0, "the choices are None"),
        ({"text": CHOICES, "label": ["A", "B"]}, 0, "4 choices and 2 labels"),
    ],
)
def test_an_answer_or_choices_that_mean_nothing_are_refused_with_their_row(choices, answer, named, tokenizer):
    tokenizer = variant(tokenizer)
    row = {"prompt": "say:", "choices": choices, "answer": answer}
    with pytest.raises(InputError, match=f"data 'data', row 1: .*{named}"):
        score(model_for(tokenizer), tokenizer, [row])


def test_the_row_that_is_named_is_that_of_the_bad_answer(tokenizer):
    tokenizer = variant(tokenizer)
    rows = [{"prompt": "say:", "choices": CHOICES, "answer": answer} for answer in (CHOICES[0], CHOICES[1], "7")]
    with pytest.raises(InputError, match="row 3: the answer '7'"):
        score(model_for(tokenizer), tokenizer, rows)
    with pytest.raises(InputError, match="row 1: the prompt is None"):
        score(model_for(tokenizer), tokenizer, [{"prompt": None, "choices": CHOICES, "answer": 0}])


def test_batches_change_nothing_and_ties_are_counted(tokenizer):
    tokenizer = variant(tokenizer)
    model = model_for(tokenizer)
    rows = [
        {
            "prompt": f"say: {' '.join(WORDS[: i % 5])}",
            "choices": [f" {' '.join(WORDS[j : j + 1 + j % 3])}" for j in range(i % 3, i % 3 + 3)],
            "answer": i % 3,
        }
        for i in range(9)
    ]
    found = [score(model, tokenizer, rows, batch_size=size) for size in (1, 4, 50)]
    assert found[0] == found[1] == found[2]
    same = [{"prompt": "say:", "choices": [" red", " red"], "answer": place} for place in (0, 1)]
    tied = score(model, tokenizer, same)
    assert (tied["multiple_choice_ties"], tied["acc"]) == (2, 1 / 2)


@pytest.mark.parametrize("kind", ["plain", "begins", "template begins"])
def test_messages_are_scored_as_their_template_writes_them(kind, tokenizer):
    tokenizer = variant(tokenizer, kind)
    model = model_for(tokenizer)
    ask = [{"role": "user", "content": "say: red"}]
    written = tokenizer.apply_chat_template(ask, tokenize=False, add_generation_prompt=True)
    before = tokenizer(written, add_special_tokens=False)["input_ids"]
    likelihoods = [
        log_likelihood(model, before, tokenizer(choice, add_special_tokens=False)["input_ids"]) for choice in CHOICES
    ]
    best = likelihoods.index(max(likelihoods))
    assert score(model, tokenizer, [{"prompt": ask, "choices": CHOICES, "answer": best}])["acc"] == 1


def test_a_prompt_that_is_too_long_keeps_its_end_and_is_counted(tokenizer):
    tokenizer = variant(tokenizer)
    model = model_for(tokenizer, max_position_embeddings=16)
    prompt = "say: " + " ".join(WORDS * 3)
    pairs = [harness_pair(tokenizer, prompt, choice) for choice in CHOICES]
    likelihoods = [log_likelihood(model, before[-(17 - len(after)) :], after) for before, after in pairs]
    best = likelihoods.index(max(likelihoods))
    with pytest.warns(UserWarning, match=re.escape("uses only the end of 1 prompts, since the model has 16 positions")):
        found = score(model, tokenizer, [{"prompt": prompt, "choices": CHOICES, "answer": best}])
    assert (found["acc"], found["multiple_choice_shortened"]) == (1, 1)
    with pytest.raises(InputError, match="row 1: a choice has 30 tokens, and the model 16 positions"):
        score(model, tokenizer, [{"prompt": prompt, "choices": ["a", " " + " ".join(WORDS * 3)], "answer": 0}])


def test_words_that_touch_are_said_and_likelihoods_that_are_no_numbers_refused(tokenizer):
    tokenizer = variant(tokenizer)
    model = model_for(tokenizer)
    rows = [{"prompt": "say: red. Answer:", "choices": ["red", "blue"], "answer": 0}]
    with pytest.warns(UserWarning, match="2 choices touch their prompt without a space, the first as 'd. Answer:red'"):
        score(model, tokenizer, rows)
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(InputError, match=r"row 1: the model's log-likelihoods are not numbers"):
        score(model, tokenizer, [{"prompt": "say:", "choices": CHOICES, "answer": 0}])
