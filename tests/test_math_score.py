"""The score `math`, on answers whose judgement is worked out by hand."""

import pytest
from datasets import Dataset
from evaluated import model_for, settings, variant
from test_evaluate_exact_match import replies

from scalora.runs import math_score as module
from scalora.runs.errors import InputError
from scalora.runs.math_score import expected_answer, final_answer, math_score, same_answer


@pytest.mark.parametrize(
    ("text", "found"),
    [
        # GSM8K's mark, before all others, and the first of several.
        ("5 + 13 = <<5+13=18>>18\n#### 18", "18"),
        ("#### 1,234", "1,234"),
        ("#### -3.50", "-3.50"),
        ("#### 1\nThe answer is: 2", "1"),
        ("#### 1\nAnother one\n#### 2", "1"),
        ("#### Step 1\nadd\n#### Step 2\nThe answer is: 7", "7"),  # headings are no answers
        # MetaMathQA's, the last of several, up to the end of the sentence.
        (r"so $x = \boxed{3}$. The answer is: 3", "3"),
        (r"The answer is: \frac{1}{2}", r"\frac{1}{2}"),
        (r"The answer is: $\frac{1}{2}$.", r"\frac{1}{2}"),
        ("The answer is: 3.\nThe answer is: 4.", "4"),
        ("The answer is: 110 apples. Good luck with the 2 others.", "110 apples"),
        (r"The final answer is \(x^2\).", "x^2"),
        ("The answer is 12", "12"),
        ("The answer is easy to find: it is 12", "12"),
        # MATH's, the last box, with the braces in it.
        (r"\boxed{1}, no: \boxed{\frac{3}{\sqrt{5}}} it is, in 7 steps", r"\frac{3}{\sqrt{5}}"),
        (r"thus $\fbox{\text{Monday}}$", r"\text{Monday}"),
        (r"\boxed{4} or \boxed{5", "4"),
        # Else the last number.
        ("first 3, then $1,234.50.", "$1,234.50"),
        ("it is between 10-15", "15"),
        ("minus -3, of 4/5", "4/5"),
        ("it is .5", ".5"),
        ("v2 of the x1", None),
        ("I don't know", None),
        ("", None),
    ],
)
def test_the_final_answer_of_a_text(text, found):
    assert final_answer(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("so 5 + 5 = 10\n#### 10", "10"),
        (r"We have $\boxed{\frac{1}{2}}$, of 7.", r"\frac{1}{2}"),
        ("… The answer is: 3.5", "3.5"),
        (r"$\frac{1}{2}$", r"\frac{1}{2}"),  # a bare one is all of it, not its last number
        ("(1, 2]", "(1, 2]"),
        ("Monday.", "Monday"),
        ("$a$ and $b$", "$a$ and $b$"),
    ],
)
def test_an_expected_text_without_a_mark_is_the_answer(text, found):
    assert expected_answer(text) == found


@pytest.mark.parametrize(
    ("found", "expected", "right"),
    [
        ("1/2", r"\frac{1}{2}", True),
        ("0.5", r"\frac12", True),
        ("2/4", r"\dfrac{1}{2}", True),
        ("0.33", r"\frac{1}{3}", False),
        ("1,234", "1234", True),
        ("1234.0", "1,234", True),
        ("1,235", "1234", False),
        ("$18", "18", True),
        (r"\$18.00", "18", True),
        ("5 apples", "5", True),
        (r"5\text{ cm}", "5", True),
        (r"90^\circ", "90", True),
        (r"50\%", "50", True),  # with or without the sign, and as a fraction
        ("0.5", r"50\%", True),
        ("5", r"50\%", False),
        (r"\{2, 1\}", r"\{1,2\}", True),
        ("1, 2", "2,1", True),
        (r"\{1, 3\}", r"\{1,2\}", False),
        ("(1, 2]", "(1,2]", True),
        ("[1, 2]", "(1,2]", False),
        (r"(-\infty, 3)", r"(-\infty,3)", True),
        ("(3,4)", "(4,3)", False),
        ("Monday", r"\text{Monday}", True),
        ("Tuesday", r"\text{Monday}", False),
        ("x = 5", "5", True),
        ("x^2+2x+1", "(x+1)^2", True),
        ("x^2+1", "(x+1)^2", False),
        (r"\sqrt{8}", r"2\sqrt{2}", True),
        ("", "5", False),
        ("{not closed", "5", False),
        ("seven", "7", False),
    ],
)
def test_two_answers_as_mathematics(found, expected, right):
    assert same_answer(found, expected) is right


def test_a_comparison_that_takes_too_long_is_not_known(monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 1)
    assert same_answer("10^{10^{10}}", "1") is None
    assert same_answer("10^{10^{10}}", "10^{10^{10}}") is True  # as texts


def score(model, tokenizer, rows, **evaluate):
    return math_score(model, tokenizer, Dataset.from_list(rows), "data", settings(**evaluate))


def test_right_wrong_unmatched_and_unfinished_answers_are_counted(tokenizer, monkeypatch):
    tokenizer = variant(tokenizer)
    model = model_for(tokenizer)
    texts = ["= 0.5<eos>", "no idea<eos>", "2, 3<eos>", "The answer is: 4<eos>", "3^9<eos>"]
    replies(monkeypatch, model, tokenizer, texts)
    monkeypatch.setattr(module, "same_answer", lambda a, b: None if a == "9" else same_answer(a, b))
    wanted = [r"\boxed{\frac{1}{2}}", "#### 1", "The answer is: 2", "3 + 1", "7"]
    rows = [{"prompt": f"say: {place}", "completion": text} for place, text in enumerate(wanted)]
    with pytest.warns(UserWarning, match="1 answers count as wrong for math, because comparing them took longer"):
        found = score(model, tokenizer, rows, batch_size=1, max_new_tokens=30)
    assert found == {
        "math": 2 / 5,
        "math_left_out": 0,
        "math_shortened": 0,
        "math_unfinished": 0,
        "math_unmatched": 1,
        "math_timed_out": 1,
    }


def test_what_can_t_be_scored_is_named(tokenizer, monkeypatch):
    tokenizer = variant(tokenizer)
    model = model_for(tokenizer)
    with pytest.raises(InputError, match="row 1: the expected answer has nothing after its mark of a final answer"):
        score(model, tokenizer, [{"prompt": "say:", "completion": r"\boxed{}"}], max_new_tokens=30)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"math needs math-verify: pip install 'scalora\[math\]'"):
        score(model, tokenizer, [{"prompt": "say:", "completion": "5"}])
