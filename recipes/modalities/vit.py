"""Fine-tunes an image classifier, such as a ViT, with ScaLoRA, and writes an ordinary PEFT adapter of the whole update.

    python recipes/modalities/vit.py --data FOLDER

FOLDER has a folder of images for each class; a dataset on the hub with images and classes will do as well.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, Image, load_dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments

from scalora import ScaLoraCallback, ScaLoraConfig, export_adapter


def parsed(words: list[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="google/vit-base-patch16-224-in21k", help="hub id or folder")
    parser.add_argument("--data", required=True, help="hub id, such as ethz/food101, or folder")
    parser.add_argument("--output", type=Path, default=Path("runs/vit"), help="output folder")
    parser.add_argument("--rank", type=int, default=8, help="rank of LoRA's factors")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="peak learning rate of AdamW")
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=32, help="images in a step")
    return parser.parse_args(words)


def classified_images(data: Dataset) -> Dataset:
    """The column of images as "image" and that of classes as "label", whatever the dataset calls them."""
    names = {
        new: next(name for name, feature in data.features.items() if isinstance(feature, kind))
        for new, kind in (("image", Image), ("label", ClassLabel))
    }
    return data.select_columns(list(names.values())).rename_columns({old: new for new, old in names.items()})


def base_model(name: str, classes: list[str]) -> Any:
    """The model, with a new head for the classes."""
    labels = dict(enumerate(classes))
    return AutoModelForImageClassification.from_pretrained(
        name,
        id2label=labels,
        label2id={name: index for index, name in labels.items()},
        ignore_mismatched_sizes=True,  # of the head that the model may have
    )


def main(words: list[str] | None = None) -> PeftModel:
    """Train, and write the adapter; returns the trained model."""
    options = parsed(words)
    data = classified_images(load_dataset(options.data, split="train"))
    classes = data.features["label"].names
    processor = AutoImageProcessor.from_pretrained(options.model)

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pixels = processor([row["image"].convert("RGB") for row in rows], return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": torch.tensor([row["label"] for row in rows])}

    lora = LoraConfig(
        r=options.rank, lora_alpha=options.rank, target_modules="all-linear", modules_to_save=["classifier"]
    )
    trainer = Trainer(
        get_peft_model(base_model(options.model, classes), lora),
        TrainingArguments(
            output_dir=str(options.output),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            learning_rate=options.learning_rate,
            warmup_steps=0.05,
            lr_scheduler_type="cosine",
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,  # the images are used by `collate`
            bf16=torch.cuda.is_available(),
        ),
        train_dataset=data,
        data_collator=collate,
        callbacks=[ScaLoraCallback(ScaLoraConfig())],
    )
    trainer.train()
    trainer.save_model()

    _, report = export_adapter(base_model(options.model, classes), options.output, options.output / "adapter")
    processor.save_pretrained(options.output / "adapter")
    print(f"rank of the update: up to {max(report.needed.values())}; adapter: {options.output / 'adapter'}")
    return trainer.model


if __name__ == "__main__":
    main()
