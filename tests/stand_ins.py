"""Stand-ins for models and data sets of the hub: tiny random models of an architecture, and folders in the hub's form.

A folder has the configurations, splits and columns of the data set that it stands for, and few rows.
"""

import torch
from datasets import ClassLabel, Dataset, Features, Value
from transformers import AutoModelForCausalLM, DebertaV2Config, DebertaV2ForSequenceClassification

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
