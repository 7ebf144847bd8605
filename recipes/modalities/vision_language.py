"""Fine-tunes a vision-language model with ScaLoRA by TRL, and writes an ordinary PEFT adapter of the whole update.

    python recipes/modalities/vision_language.py --data FOLDER

FOLDER has images and a metadata.jsonl with file_name, prompt and completion in each line; a dataset on the hub with
images and two columns of text will do as well. The loss is that of the completions.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from datasets import Image, load_dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

from scalora import ScaLoraCallback, ScaLoraConfig, export_adapter


def parsed(words: list[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolVLM-256M-Instruct", help="hub id or folder")
    parser.add_argument("--data", required=True, help="hub id or folder")
    parser.add_argument("--prompt-column", default="prompt", help="what the user says about the image")
    parser.add_argument("--completion-column", default="completion", help="what the model shall answer")
    parser.add_argument("--output", type=Path, default=Path("runs/vision-language"), help="output folder")
    parser.add_argument("--rank", type=int, default=8, help="rank of LoRA's factors")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="peak learning rate of AdamW")
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=8, help="images in a step")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> PeftModel:
    """Train, and write the adapter; returns the trained model."""
    options = parsed(words)
    data = load_dataset(options.data, split="train")
    image = next(name for name, feature in data.features.items() if isinstance(feature, Image))

    def conversations(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {
            "images": [[picture.convert("RGB")] for picture in rows[image]],
            "prompt": [[{"role": "user", "content": text}] for text in rows[options.prompt_column]],
            "completion": [[{"role": "assistant", "content": text}] for text in rows[options.completion_column]],
        }

    processor = AutoProcessor.from_pretrained(options.model)
    trainer = SFTTrainer(
        AutoModelForImageTextToText.from_pretrained(options.model, dtype="float32"),
        SFTConfig(
            output_dir=str(options.output),
            max_length=None,  # a prompt cut short would lose a part of its image
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            learning_rate=options.learning_rate,
            warmup_steps=0.05,
            lr_scheduler_type="cosine",
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,  # they are used by `conversations`
            bf16=torch.cuda.is_available(),
        ),
        train_dataset=data.with_transform(conversations),
        processing_class=processor,
        peft_config=LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules="all-linear"),
        callbacks=[ScaLoraCallback(ScaLoraConfig())],
    )
    trainer.train()
    trainer.save_model()

    base = AutoModelForImageTextToText.from_pretrained(options.model, dtype="float32")
    _, report = export_adapter(base, options.output, options.output / "adapter")
    processor.save_pretrained(options.output / "adapter")
    print(f"rank of the update: up to {max(report.needed.values())}; adapter: {options.output / 'adapter'}")
    return trainer.model


if __name__ == "__main__":
    main()
