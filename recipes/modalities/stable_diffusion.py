"""Fine-tunes the UNet of a Stable Diffusion on images with captions with ScaLoRA, and writes ordinary adapters.

    python recipes/modalities/stable_diffusion.py --data FOLDER

FOLDER has images and a metadata.csv with the columns file_name and text; a dataset on the hub with images and a column
of text will do as well. OUTPUT/adapter is for PEFT, OUTPUT/pytorch_lora_weights.safetensors for the pipeline's
`load_lora_weights`: both hold the whole update. Needs `pip install diffusers`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Image, load_dataset
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import ImageOps
from safetensors.torch import load_file
from torch.nn.functional import mse_loss

from scalora import ScaLora, ScaLoraConfig, export_adapter

# The attention processors and their feed-forward layers, and the convolutions of the residual blocks.
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "conv1", "conv2"]


def parsed(words: list[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="stable-diffusion-v1-5/stable-diffusion-v1-5", help="hub id or folder")
    parser.add_argument("--data", required=True, help="hub id or folder")
    parser.add_argument("--text-column", default="text", help="captions")
    parser.add_argument("--output", type=Path, default=Path("runs/stable-diffusion"), help="output folder")
    parser.add_argument("--targets", nargs="+", default=TARGETS, help="ends of the names of the layers to adapt")
    parser.add_argument("--rank", type=int, default=8, help="rank of LoRA's factors")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="peak learning rate of AdamW")
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=4, help="images in a step")
    return parser.parse_args(words)


class Batches:
    """Latent images with their encoded captions, which the frozen parts of a pipeline make."""

    def __init__(self, pipeline: StableDiffusionPipeline, text_column: str, image_column: str) -> None:
        self.pipeline, self.text_column, self.image_column = pipeline, text_column, image_column
        self.side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor

    def __call__(self, rows: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
        """The latents and the encoded captions of rows."""
        images = [ImageOps.fit(row[self.image_column].convert("RGB"), (self.side, self.side)) for row in rows]
        vae, tokenizer = self.pipeline.vae, self.pipeline.tokenizer
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(vae.device) / 127.5 - 1
        ids = tokenizer(
            [row[self.text_column] for row in rows],
            padding="max_length",
            truncation=True,
            max_length=tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids.to(vae.device)
        with torch.no_grad():
            latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
            return latents, self.pipeline.text_encoder(ids)[0]


def loss_of(unet: torch.nn.Module, noises: DDPMScheduler, latents: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """The squared error of what the model says of noise at random times."""
    noise = torch.randn_like(latents)
    times = torch.randint(0, noises.config.num_train_timesteps, (len(latents),), device=latents.device)
    noisy = noises.add_noise(latents, noise, times)
    velocity = noises.config.prediction_type == "v_prediction"
    wanted = noises.get_velocity(latents, noise, times) if velocity else noise
    return mse_loss(unet(noisy, times, encoder_hidden_states=texts).sample.float(), wanted)


def main(words: list[str] | None = None) -> PeftModel:
    """Train, and write the adapters; returns the trained UNet."""
    options = parsed(words)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = StableDiffusionPipeline.from_pretrained(options.model, safety_checker=None).to(device)
    noises = DDPMScheduler.from_config(pipeline.scheduler.config)
    data = load_dataset(options.data, split="train")
    image_column = next(name for name, feature in data.features.items() if isinstance(feature, Image))
    sampler = torch.utils.data.RandomSampler(data, num_samples=options.steps * options.batch)
    loader = torch.utils.data.DataLoader(
        data, options.batch, sampler=sampler, collate_fn=Batches(pipeline, options.text_column, image_column)
    )

    pipeline.unet.requires_grad_(False)
    lora = LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=options.targets)
    unet = get_peft_model(pipeline.unet, lora)
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=options.learning_rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, options.steps // 20, options.steps)
    scalora = ScaLora(unet, optimizer, ScaLoraConfig())

    unet.train()
    for step, (latents, texts) in enumerate(loader, 1):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = loss_of(unet, noises, latents, texts)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 10 == 0:
            print(f"step {step}: loss {loss:.4f}, {scalora.metrics()}", flush=True)
    scalora.save(options.output)

    base = UNet2DConditionModel.from_pretrained(options.model, subfolder="unet")
    _, report = export_adapter(base, options.output, options.output / "adapter")
    tensors = load_file(options.output / "adapter" / "adapter_model.safetensors")
    layers = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    StableDiffusionPipeline.save_lora_weights(options.output, unet_lora_layers=layers)
    print(f"rank of the update: up to {max(report.needed.values())}; adapters: {options.output}")
    return unet


if __name__ == "__main__":
    main()
