"""Tiny models of the architectures in Transformers, made from their configuration classes by shrinking the defaults."""

import re

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# Which class makes a model with this head, and which architectures have one.
HEADS = {
    "causal": ("AutoModelForCausalLM", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "sequence to sequence": ("AutoModelForSeq2SeqLM", modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    "masked": ("AutoModelForMaskedLM", modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    "classifier": ("AutoModelForSequenceClassification", modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
}

VOCABULARY, MOST_PARAMETERS = 64, 4_000_000

# The first pattern that a setting's name ends with says how large it may be.
_SIZES = {
    r"vocab_size": VOCABULARY,
    r"num_experts_per_tok|moe_topk|moe_top_k|moe_k|top_k_experts|num_selected_experts|experts_per_token": 2,
    r"num_experts|n_routed_experts|num_local_experts|moe_num_experts|num_routed_experts": 4,
    r"n_group|topk_group": 1,
    r"kv_lora_rank|q_lora_rank|qk_nope_head_dim|v_head_dim|rotary_dim": 8,
    r"qk_rope_head_dim": 4,
    r"(hidden_|_|n_|num_|encoder_|decoder_)layers?|num_hidden_groups": 2,
    r"key_value_heads|n?u?m?_?kv_heads": 2,
    r"attention_heads|n_heads?|num_heads": 4,
    r"head_dim|d_kv|kv_channels": 8,
    r"intermediate_size|ffn_dim|n_inner|d_ff|ffn_hidden_size|mlp_dim|ffn_embed_dim": 48,
    r"hidden_size|d_model|n_embd|^dim|embed_dim|embedding_size|word_embed_proj_dim|hidden_dim|lru_width": 32,
    r"projection_dim": 32,
    r"position_embeddings|n_positions|n_ctx|max_seq_len|sliding_window|attention_window_size|block_size": 64,
    r"image_size": 16,
    r"patch_size": 8,
}
_TOKENS = {"pad": 0, "bos": 1, "eos": 2, "decoder_start": 0, "forced_bos": 1, "forced_eos": 2}
_LISTS_BY_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types")
_DEFAULT_IS_NONE = ("head_dim", "num_key_value_heads", "n_inner")


class TooLargeError(ValueError):
    """An architecture whose sizes have names that are not among `_SIZES`."""


def tiny(kind, head):
    """A tiny model of an architecture, and a batch with labels for it."""
    auto = getattr(transformers, HEADS[head][0])
    config = _shrunk(CONFIG_MAPPING[kind])
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise TooLargeError(f"{kind} has {size:,} parameters")
    torch.manual_seed(0)
    # Making a model may change its configuration.
    model = auto.from_config(_shrunk(CONFIG_MAPPING[kind]))
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, VOCABULARY, (2, 16), generator=generator)
    ids[:, -1] = _TOKENS["eos"]  # classifiers read the last of them
    return model, {"input_ids": ids, "labels": torch.tensor([0, 1]) if head == "classifier" else ids}


def _shrunk(kind):
    settings = _smaller(kind)
    return kind(**settings)


def _smaller(kind):
    """The settings of a configuration class that have to be smaller than by default, nested ones as well."""
    defaults = kind().to_dict()
    settings = {key: _smaller(nested) for key, nested in getattr(kind, "sub_configs", {}).items() if _is_plain(nested)}
    for key, value in defaults.items():
        if (isinstance(value, int) and not isinstance(value, bool)) or (value is None and key in _DEFAULT_IS_NONE):
            size = next((size for pattern, size in _SIZES.items() if re.search(rf"({pattern})$", key)), None)
            if size is not None and (value is None or value > size):
                settings[key] = size
    for key, number in _TOKENS.items():
        if f"{key}_token_id" in defaults or (key == "decoder_start" and defaults.get("is_encoder_decoder")):
            settings[f"{key}_token_id"] = number
    for key in _LISTS_BY_LAYER:
        if isinstance(types := defaults.get(key), list):
            # Each kind of layer once, the last one last: it often has to be full attention.
            chosen = list(dict.fromkeys(reversed(types)))[::-1]
            settings[key] = chosen if len(chosen) > 1 else chosen * 2
            layers = next((name for name in ("num_hidden_layers", "n_layer", "num_layers") if name in defaults), None)
            if layers is not None:
                settings[layers] = len(settings[key])
    if "kv_lora_rank" in defaults:  # latent attention, whose head sizes depend on one another
        sizes = {"head_dim": 4, "qk_rope_head_dim": 4, "qk_head_dim": 12, "num_key_value_heads": 4}
        settings |= {key: size for key, size in sizes.items() if key in defaults}
    return settings


def _is_plain(nested):
    return nested.__name__ not in ("AutoConfig", "PreTrainedConfig")
