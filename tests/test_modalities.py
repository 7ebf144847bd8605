"""The recipes for images, speech, images with text and diffusion, on tiny models and made-up data in folders.

The truth is what plain PEFT, or diffusers, makes of the adapter that a recipe has written.
"""

import json
import re
import sys
from importlib import import_module
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from architecture_trials import agree
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from PIL import Image
from scipy.io import wavfile
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForImageClassification,
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

from scalora import ScaLora, ScaLoraConfig, UnsupportedLayerError, export_adapter

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes" / "modalities"
sys.path.append(str(RECIPES.parent))

R, STEPS = 2, 20
COLOURS = {"blue": (40, 60, 220), "green": (40, 200, 60), "red": (220, 40, 40)}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def run(recipe, folder, **options):
    """The recipe's model, trained on the data in a folder, and the folder with what it has written."""
    settings = {"rank": R, "steps": STEPS, "batch": 6, "learning-rate": 1e-2} | options
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    places = [f"--{key}={folder / key}" for key in ("model", "data", "output")]
    return import_module(f"modalities.{recipe}").main([*places, *words]).eval(), folder / "output"


def check_shipped(adapter, trained, base, outputs, loss):
    """The adapter in plain PEFT says what the trained model says, has learned, and has a rank above LoRA's."""
    with torch.no_grad():
        wanted, before = outputs(trained), outputs(base)
        agree(outputs(adapter), wanted, 2e-3)
        assert (before - wanted).norm() > 0.1 * wanted.norm()
        assert loss(adapter) < 0.9 * loss(base)
    updates = [m.get_delta_weight("default") for m in adapter.modules() if isinstance(m, LoraLayer)]
    assert max(int(torch.linalg.matrix_rank(update.flatten(1), rtol=1e-2)) for update in updates) > R


def picture(colour, generator):
    """An image of one colour with noise."""
    noise = generator.integers(-30, 30, (20, 20, 3))
    return Image.fromarray(np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8))


def write_pictures(folder, rows):
    """Images and a metadata.jsonl, whose rows `rows` makes of the colours."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    lines = []
    for index in range(18):
        colour = list(COLOURS)[index % 3]
        picture(colour, generator).save(folder / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png"} | rows(colour)))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def of_words(words, **special):
    """A tokenizer of whole words, which take as many tokens as they are."""
    vocabulary = {word: index for index, word in enumerate([*special.values(), *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=special["pad_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.mark.slow
def test_an_image_classifier_learns_colours_from_a_folder(tmp_path):
    torch.manual_seed(3)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=16,
        patch_size=8,
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "model")
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    processor.save_pretrained(tmp_path / "model")
    generator = np.random.default_rng(0)
    for colour in COLOURS:
        (tmp_path / "data" / colour).mkdir(parents=True)
        for index in range(6):
            picture(colour, generator).save(tmp_path / "data" / colour / f"{index}.png")
    trained, output = run("vit", tmp_path)
    assert trained.config.id2label == dict(enumerate(COLOURS))

    unseen = np.random.default_rng(1)
    pixels = processor([picture(colour, unseen) for colour in COLOURS], return_tensors="pt")["pixel_values"]

    def fresh():
        return AutoModelForImageClassification.from_pretrained(
            tmp_path / "model", num_labels=3, ignore_mismatched_sizes=True
        ).eval()

    check_shipped(
        PeftModel.from_pretrained(fresh(), output / "adapter").eval(),
        trained,
        fresh(),
        lambda model: model(pixel_values=pixels).logits,
        lambda model: model(pixel_values=pixels, labels=torch.arange(3)).loss,
    )


@pytest.mark.slow
def test_a_speech_recogniser_learns_tones_from_recordings_at_another_rate(tmp_path):
    pytest.importorskip("soundfile", reason="soundfile is not installed")
    tones = {"low": 300, "middle": 900, "high": 2700}
    special = [
        "<|endoftext|>",
        "<|startoftranscript|>",
        "<|en|>",
        "<|transcribe|>",
        "<|translate|>",
        "<|notimestamps|>",
    ]
    letters = sorted({letter for word in tones for letter in word})
    tokenizer = WhisperTokenizer(
        {token: index for index, token in enumerate([*special, *letters])}, [], pad_token=special[0]
    )
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    # Recordings of 1 s, where Whisper's have 30: 100 frames, of which a convolution leaves half.
    extractor = WhisperFeatureExtractor(feature_size=16, chunk_length=1)
    WhisperProcessor(extractor, tokenizer).save_pretrained(tmp_path / "model")
    torch.manual_seed(3)
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        num_mel_bins=16,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_source_positions=50,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=1,
        init_std=0.2,
    )
    WhisperForConditionalGeneration(config).save_pretrained(tmp_path / "model")

    def sound(word, rate, generator):
        times = np.arange(rate // 2) / rate
        noise = generator.normal(scale=0.05, size=len(times))
        return (0.5 * np.sin(2 * np.pi * tones[word] * times) + noise).astype(np.float32)

    (tmp_path / "data").mkdir()
    generator = np.random.default_rng(0)
    lines = ["file_name,transcription"]
    for index in range(12):
        word = list(tones)[index % 3]
        stereo = np.stack([sound(word, 8000, generator)] * 2, axis=1)
        wavfile.write(tmp_path / "data" / f"{index}.wav", 8000, stereo)
        lines.append(f"{index}.wav,{word}")
    (tmp_path / "data" / "metadata.csv").write_text("\n".join(lines))
    trained, output = run("whisper", tmp_path, language="en")

    unseen = np.random.default_rng(1)
    sounds = [sound(word, 16000, unseen) for word in tones]
    features = extractor(sounds, sampling_rate=16000, return_tensors="pt")["input_features"]
    prefix = [2, 3, 5]  # language, task, no timestamps
    said = [[*prefix, *tokenizer(word, add_special_tokens=False)["input_ids"], 0] for word in tones]
    labels = torch.tensor([ids + [-100] * (max(map(len, said)) - len(ids)) for ids in said])

    def fresh():
        return WhisperForConditionalGeneration.from_pretrained(tmp_path / "model").eval()

    check_shipped(
        PeftModel.from_pretrained(fresh(), output / "adapter").eval(),
        trained,
        fresh(),
        lambda model: model(input_features=features, labels=labels).logits,
        lambda model: model(input_features=features, labels=labels).loss,
    )


@pytest.mark.slow
def test_a_vision_language_model_learns_to_name_what_its_images_show(tmp_path):
    tokenizer = of_words(
        ["user:", "assistant:", "which", "colour", "is", "it", *COLOURS],
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        image_token="<image>",
    )
    template = (
        "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
        "{{ '<image> ' if part['type'] == 'image' else part['text'] }}{% endfor %}"
        "{{ ' <eos>' if message['role'] == 'assistant' else ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    sides = {"height": 16, "width": 16}
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=sides)
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    processor.save_pretrained(tmp_path / "model")
    torch.manual_seed(3)
    of_both = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**of_both, image_size=16, patch_size=8),
        text_config=LlamaConfig(
            **of_both, vocab_size=len(tokenizer), num_key_value_heads=2, pad_token_id=0, initializer_range=0.2
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
    )
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    write_pictures(tmp_path / "data", lambda colour: {"prompt": "which colour is it", "completion": colour})
    trained, output = run("vision_language", tmp_path)

    unseen = np.random.default_rng(1)
    batch = processor(
        images=[picture(colour, unseen) for colour in COLOURS],
        text=[f"user: <image> which colour is it assistant: {colour} <eos>" for colour in COLOURS],
        return_tensors="pt",
    )
    labels = batch["input_ids"].clone()
    labels[:, :-2] = -100

    def fresh():
        return LlavaForConditionalGeneration.from_pretrained(tmp_path / "model").eval()

    adapter = PeftModel.from_pretrained(fresh(), output / "adapter").eval()
    check_shipped(
        adapter,
        trained,
        fresh(),
        lambda model: model(**batch).logits,
        lambda model: model(**batch, labels=labels).loss,
    )
    with torch.no_grad():
        named = adapter(**batch).logits[:, -3].argmax(dim=-1)
    assert tokenizer.convert_ids_to_tokens(named) == list(COLOURS)
    assert any("vision_tower" in name and isinstance(m, LoraLayer) for name, m in adapter.named_modules())


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers", reason="diffusers is not installed")


@pytest.fixture
def pipeline(diffusers, tmp_path):
    """A tiny Stable Diffusion, saved in a folder."""
    torch.manual_seed(3)
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *(f"{letter}</w>" for letter in "rgb")]
    tokenizer = CLIPTokenizer({token: i for i, token in enumerate(vocabulary)}, [], model_max_length=8)
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    of_text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextModel(CLIPTextConfig(**of_text, vocab_size=5, max_position_embeddings=8, **ids))
    saved = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
    )
    saved.save_pretrained(tmp_path / "model")
    return saved


def noisy(seed=0):
    """What a UNet gets, and the noise that it shall find."""
    generator = torch.Generator().manual_seed(seed)
    noise, texts = (torch.randn(*shape, generator=generator) for shape in ((4, 4, 8, 8), (4, 8, 16)))
    return {"sample": noise, "timestep": torch.tensor([1, 300, 700, 999]), "encoder_hidden_states": texts}, noise


@pytest.mark.slow
def test_a_unet_learns_in_convolutions_and_attention_and_diffusers_loads_the_adapter(diffusers, pipeline, tmp_path):
    write_pictures(tmp_path / "data", lambda colour: {"text": colour[0]})
    trained, output = run("stable_diffusion", tmp_path, steps=40, **{"learning-rate": 5e-3})
    inputs, noise = noisy()

    def fresh():
        return diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "model", subfolder="unet").eval()

    def outputs(model):
        return model(**inputs).sample

    adapter = PeftModel.from_pretrained(fresh(), output / "adapter").eval()
    check_shipped(adapter, trained, fresh(), outputs, lambda model: (outputs(model) - noise).square().mean())
    adapted = [name for name, module in adapter.named_modules() if isinstance(module, LoraLayer)]
    for part in ("resnets.0.conv1", "attn1.to_q", "attn2.to_k", "attn2.to_out.0", "ff.net.2"):
        assert any(name.endswith(part) for name in adapted)

    loaded = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "model", safety_checker=None)
    loaded.load_lora_weights(output)
    with torch.no_grad():
        agree(outputs(loaded.unet.eval()), outputs(adapter), 1e-5)


def with_own_adapter(pipeline, config):
    """The UNet with LoRA by diffusers' own method, as its training scripts do it, and ScaLoRA."""
    unet = pipeline.unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=R, lora_alpha=2 * R, target_modules=["conv1", "to_q", "to_out.0"]))
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=5e-3)
    return unet, optimizer, ScaLora(unet, optimizer, config)


@pytest.mark.slow
def test_diffusers_own_adapters_are_saved_by_diffusers_with_the_whole_update(diffusers, pipeline, tmp_path):
    unet, optimizer, engine = with_own_adapter(pipeline, ScaLoraConfig(warmup_steps=1))
    inputs, noise = noisy()
    for _ in range(4):
        optimizer.zero_grad()
        (unet(**inputs).sample - noise).square().mean().backward()
        optimizer.step()
    assert engine.metrics()["scalora/rescales"] == 3
    tensors = get_peft_model_state_dict(unet)
    assert max(len(tensor) for name, tensor in tensors.items() if "lora_A" in name) > R

    metadata = {"unet_lora_adapter_metadata": unet.peft_config["default"].to_dict()}
    diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path / "script", tensors, **metadata)
    unet.save_lora_adapter(tmp_path / "own")
    of_script, of_own = (
        diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "model", safety_checker=None) for _ in range(2)
    )
    of_script.load_lora_weights(tmp_path / "script")
    of_own.unet.load_lora_adapter(tmp_path / "own", prefix=None, weight_name="pytorch_lora_weights.safetensors")
    with torch.no_grad():
        trained = unet.eval()(**inputs).sample
        for loaded in (of_script, of_own):
            agree(loaded.unet.eval()(**inputs).sample, trained, 1e-5)
        unet.disable_adapters()
        assert (unet(**inputs).sample - trained).norm() > 0.01 * trained.norm()


def test_diffusers_own_adapters_cannot_be_dense(pipeline):
    with pytest.raises(UnsupportedLayerError, match="merge='factored'"):
        with_own_adapter(pipeline, ScaLoraConfig(merge="dense"))


def test_a_diffusion_transformer_learns_in_its_linear_layers(diffusers, tmp_path):
    sizes = {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "pos_embed_max_size": 8}
    of_texts = {"joint_attention_dim": 16, "caption_projection_dim": 16, "pooled_projection_dim": 16}

    def fresh():
        torch.manual_seed(0)
        return diffusers.SD3Transformer2DModel(sample_size=8, in_channels=4, out_channels=4, **sizes, **of_texts)

    inputs, noise = noisy()
    named = {"hidden_states": noise, "timestep": inputs["timestep"], "pooled_projections": torch.ones(4, 16)}
    named["encoder_hidden_states"] = inputs["encoder_hidden_states"]
    trained = get_peft_model(fresh(), LoraConfig(r=R, lora_alpha=R, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=5e-3)
    engine = ScaLora(trained, optimizer, ScaLoraConfig(warmup_steps=2))

    def loss(model):
        return (model(**named).sample - noise).square().mean()

    for _ in range(8):
        optimizer.zero_grad()
        loss(trained).backward()
        optimizer.step()
    engine.save(tmp_path / "state")
    export_adapter(fresh(), tmp_path / "state", tmp_path / "adapter")
    adapter = PeftModel.from_pretrained(fresh(), tmp_path / "adapter").eval()
    check_shipped(adapter, trained.eval(), fresh().eval(), lambda model: model(**named).sample, loss)


def test_the_page_names_every_recipe_and_a_test_that_is_there_for_each():
    page = (ROOT / "docs" / "modalities.md").read_text(encoding="utf-8")
    source = Path(__file__).read_text(encoding="utf-8")
    rows = {row.split("|")[1].strip(): re.findall(r"`(test_\w+)`", row) for row in page.splitlines() if row[:2] == "| "}
    recipes = [path.name for path in RECIPES.glob("*.py")]
    assert len(recipes) == 4
    for recipe in recipes:
        assert f"](../recipes/modalities/{recipe})" in page
        assert rows[recipe], recipe
    for name in (name for named in rows.values() for name in named):
        assert f"def {name}(" in source
