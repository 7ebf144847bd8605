"""Stand-ins for models and data sets of the hub: tiny random models of an architecture, and folders in the hub's form.

A folder has the configurations, splits and columns of the data set that it stands for, and few rows.
"""

import torch
from conftest import CHAT_TEMPLATE
from datasets import ClassLabel, Dataset, Features, Value
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoModelForCausalLM,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    PreTrainedTokenizerFast,
)

TEXTS = ["red", "blue", "green", "black", "white", "grey", "pink", "brown", "gold", "teal"]

# Of nyu-mll/glue: the columns with texts, the classes (None: numbers) and the splits of each configuration.
GLUE = {
    "cola": (["sentence"], ["unacceptable", "acceptable"], ["train", "validation"]),
    "sst2": (["sentence"], ["negative", "positive"], ["train", "validation"]),
    "mrpc": (["sentence1", "sentence2"], ["not_equivalent", "equivalent"], ["train", "validation"]),
    "stsb": (["sentence1", "sentence2"], None, ["train", "validation"]),
    "qqp": (["question1", "question2"], ["not_duplicate", "duplicate"], ["train", "validation"]),
    "mnli": (
        ["premise", "hypothesis"],
        ["entailment", "neutral", "contradiction"],
        ["train", "validation_matched", "validation_mismatched"],
    ),
    "qnli": (["question", "sentence"], ["entailment", "not_entailment"], ["train", "validation"]),
    "rte": (["sentence1", "sentence2"], ["entailment", "not_entailment"], ["train", "validation"]),
}


def hub_folder(folder, sets):
    """A data set as the hub has it, from {configuration: {split: (rows, features or None)}}."""
    lines = ["---", "configs:"]
    for config, splits in sets.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, (rows, features) in splits.items():
            path = folder / config / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            Dataset.from_list(rows, features=features).to_parquet(path)
            lines += [f"  - split: {split}", f"    path: {config}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return folder


def glue(folder, rows=12):
    sets = {}
    for config, (columns, classes, splits) in GLUE.items():
        label = Value("float32") if classes is None else ClassLabel(names=classes)
        features = Features({column: Value("string") for column in columns} | {"label": label, "idx": Value("int32")})
        made = [
            {column: f"{TEXTS[(i + place) % 10]} {TEXTS[i % 3]}" for place, column in enumerate(columns)}
            | {"label": i % 6 - 0.25 if classes is None else i % len(classes), "idx": i}
            for i in range(rows)
        ]
        sets[config] = dict.fromkeys(splits, (made, features))
    return hub_folder(folder, sets)


def deberta(folder, tokenizer):
    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        type_vocab_size=0,
        relative_attention=True,
        position_buckets=16,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    DebertaV2ForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def causal(folder, tokenizer, config):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def word_tokenizer(texts):
    """A tokenizer that has a token for each word of some texts, so that long prompts have few tokens."""
    made = Tokenizer(BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<unk>", "<pad>", "<eos>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=1500, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", chat_template=CHAT_TEMPLATE
    )


COMMONSENSE_TRAIN = {
    "instruction": "Please answer the following question with true or false, question: is ice cold?\n\nAnswer format: "
    "true/false",
    "input": "",
    "output": "the correct answer is true",
    "answer": "true",
}
CHOICES = {"text": ["sand", "snow", "salt", "silk"], "label": ["A", "B", "C", "D"]}

# Of each test: hub id, configuration, split, and a row with the columns that the hub has.
COMMONSENSE = {
    "BoolQ": (
        "google/boolq",
        "default",
        "validation",
        {"question": "is the sky blue", "answer": False, "passage": "It is dark."},
    ),
    "PIQA": (
        "baber/piqa",
        "default",
        "validation",
        {"goal": "Cool a drink", "sol1": "Add ice.", "sol2": "Add salt.", "label": 1},
    ),
    "SIQA": (
        "lighteval/siqa",
        "default",
        "validation",
        {
            "context": "Kim ran.",
            "question": "Why?",
            "answerA": "for a bus",
            "answerB": "for fun",
            "answerC": "to rest",
            "label": "3",
        },
    ),
    "HellaSwag": (
        "Rowan/hellaswag",
        "default",
        "validation",
        {
            "ind": 3,
            "activity_label": "Playing drums",
            "ctx_a": "A man sits.",
            "ctx_b": "he",
            "ctx": "A man sits. he",
            "endings": ["sings.", "plays.", "sleeps.", "leaves."],
            "source_id": "a",
            "split": "val",
            "split_type": "indomain",
            "label": "1",
        },
    ),
    "WinoGrande": (
        "allenai/winogrande",
        "winogrande_xl",
        "validation",
        {"sentence": "Ann thanked Bea because _ had helped.", "option1": "Ann", "option2": "Bea", "answer": "2"},
    ),
    "ARC-e": (
        "allenai/ai2_arc",
        "ARC-Easy",
        "test",
        {"id": "1", "question": "What melts?", "choices": CHOICES, "answerKey": "B"},
    ),
    "ARC-c": (
        "allenai/ai2_arc",
        "ARC-Challenge",
        "test",
        {
            "id": "2",
            "question": "What is woven?",
            "choices": {"text": ["sand", "snow", "silk"], "label": ["1", "2", "3"]},
            "answerKey": "3",
        },
    ),
    "OBQA": (
        "allenai/openbookqa",
        "main",
        "test",
        {"id": "3", "question_stem": "Beaches are made of", "choices": CHOICES, "answerKey": "A"},
    ),
}


def commonsense(folder, data):
    """The training set and the tests; returns the words that put them in place of the hub's in a section `data`."""
    # As many rows as the hub's, because the recipe holds some out at places of it.
    path = folder / "train" / "default" / "train-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    Dataset.from_dict({column: [value] * 170_420 for column, value in COMMONSENSE_TRAIN.items()}).to_parquet(path)
    words = []
    for split in ("train", "eval"):
        words += [
            f"--run.data.{split}",
            data[split].replace("zwhe99/commonsense_170k", str(folder / "train" / "default")),
        ]
    for test, (_, config, split, row) in COMMONSENSE.items():
        tests = hub_folder(folder / test, {config: {split: ([row] * 3, None)}})
        words += [f"--tests.{test}.data.eval", f"{tests}:{config}@{split}"]
    return words


MATH_TRAIN = {
    "type": "GSM_Rephrased",
    "query": "What is 2 + 3?",
    "original_question": "What is 2 + 3?",
    "response": "It is 5.\n#### 5\nThe answer is: 5",
}
GSM8K = {"question": "Tom has 1200 apples and eats 3. How many are left?", "answer": "1200 - 3 = 1197\n#### 1,197"}
MATH = {
    "problem": "Simplify $\\frac{2}{4}$.",
    "level": "Level 1",
    "type": "Algebra",
    "solution": "Divide: $\\boxed{\\frac{1}{2}}$.",
}
SUBJECTS = [
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
]


def mathematics(folder):
    """The training set and the tests; returns the words that put them in place of the hub's."""
    train = hub_folder(folder / "train", {"default": {"train": ([MATH_TRAIN] * 520, None)}})
    gsm8k = hub_folder(folder / "gsm8k", {"main": {"test": ([GSM8K] * 2, None)}})
    problems = hub_folder(folder / "math", {subject: {"test": ([MATH], None)} for subject in SUBJECTS})
    sets = ", ".join(f"'{problems}:{subject}@test'" for subject in SUBJECTS)
    return [
        *("--run.data.train", f"{train}@train[:25%]", "--run.data.eval", f"{train}@train[-500:]"),
        *("--tests.GSM8K.data.eval", f"{gsm8k}:main@test", "--tests.MATH.data.eval", f"[{sets}]"),
    ]
