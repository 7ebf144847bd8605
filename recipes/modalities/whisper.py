"""Fine-tunes a speech recogniser, such as Whisper, with ScaLoRA, and writes a PEFT adapter of the whole update.

    python recipes/modalities/whisper.py --data FOLDER --language german

FOLDER has audio files and a metadata.csv with the columns file_name and transcription; a dataset on the hub with audio
and a column of text will do as well. Needs `pip install soundfile`, which reads WAV, FLAC, Ogg and MP3.
"""

from __future__ import annotations

import argparse
from io import BytesIO
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from datasets import Audio, Dataset, load_dataset
from peft import LoraConfig, PeftModel, get_peft_model
from scipy.signal import resample_poly
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, Trainer, TrainingArguments

from scalora import ScaLoraCallback, ScaLoraConfig, export_adapter


def parsed(words: list[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="openai/whisper-small", help="hub id or folder")
    parser.add_argument("--data", required=True, help="hub id or folder")
    parser.add_argument("--subset", help="configuration of a dataset on the hub, such as a language")
    parser.add_argument("--text-column", default="transcription", help="what was said")
    parser.add_argument("--language", help="language of the recordings; left out, the tokens don't name one")
    parser.add_argument("--output", type=Path, default=Path("runs/whisper"), help="output folder")
    parser.add_argument("--rank", type=int, default=8, help="rank of LoRA's factors")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="peak learning rate of AdamW")
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=16, help="recordings in a step")
    return parser.parse_args(words)


def recordings(name: str, subset: str | None) -> Dataset:
    """The rows of a folder's metadata.csv, or of a dataset on the hub, with encoded audio or the path to it."""
    if not Path(name).is_dir():
        return load_dataset(name, subset, split="train").cast_column("audio", Audio(decode=False))
    # As an audio folder it would need torchcodec and FFmpeg.
    rows = load_dataset("csv", data_files=str(Path(name, "metadata.csv")), split="train")
    return rows.map(lambda row: {"audio": {"path": str(Path(name, row["file_name"])), "bytes": None}})


def waveform(audio: dict[str, Any], rate: int) -> np.ndarray:
    """One channel of a recording, in as many samples a second as the model takes."""
    samples, own_rate = soundfile.read(BytesIO(audio["bytes"]) if audio["bytes"] else audio["path"], dtype="float32")
    mono = samples if samples.ndim == 1 else samples.mean(axis=1)
    common = gcd(rate, own_rate)
    return resample_poly(mono, rate // common, own_rate // common)


def main(words: list[str] | None = None) -> PeftModel:
    """Train, and write the adapter; returns the trained model."""
    options = parsed(words)
    data = recordings(options.data, options.subset)
    processor = AutoProcessor.from_pretrained(options.model)
    if options.language:
        processor.tokenizer.set_prefix_tokens(language=options.language, task="transcribe")
    model = AutoModelForSpeechSeq2Seq.from_pretrained(options.model)
    rate = processor.feature_extractor.sampling_rate

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        sounds = [waveform(row["audio"], rate) for row in rows]
        inputs = processor.feature_extractor(sounds, sampling_rate=rate, return_tensors="pt")
        labels = processor.tokenizer(
            [row[options.text_column] for row in rows],
            padding=True,
            truncation=True,
            max_length=model.config.max_target_positions,
            return_tensors="pt",
        )
        ids = labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100)
        # The decoder's inputs are the labels behind its start token, which the tokenizer has put in front of them.
        return {"input_features": inputs["input_features"], "labels": ids[:, 1:]}

    lora = LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules="all-linear")
    trainer = Trainer(
        get_peft_model(model, lora),
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
            remove_unused_columns=False,  # the audio is used by `collate`
            bf16=torch.cuda.is_available(),
        ),
        train_dataset=data,
        data_collator=collate,
        callbacks=[ScaLoraCallback(ScaLoraConfig())],
    )
    trainer.train()
    trainer.save_model()

    base = AutoModelForSpeechSeq2Seq.from_pretrained(options.model)
    _, report = export_adapter(base, options.output, options.output / "adapter")
    processor.save_pretrained(options.output / "adapter")
    print(f"rank of the update: up to {max(report.needed.values())}; adapter: {options.output / 'adapter'}")
    return trainer.model


if __name__ == "__main__":
    main()
