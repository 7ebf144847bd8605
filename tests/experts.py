"""Tiny mixtures of experts, and the same models with each expert a linear layer of its own."""

import re

import torch
from models import with_lora
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from torch.nn.functional import one_hot
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

EXPERTS = 6

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}

_DEEPSEEK = {
    "moe_intermediate_size": 12,
    "n_routed_experts": EXPERTS,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}

MODELS = {
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": EXPERTS, "intermediate_size": 12}),
    "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, {"num_experts": EXPERTS, "moe_intermediate_size": 12}),
    # Stored (in, out), with biases.
    "gpt_oss": (GptOssForCausalLM, GptOssConfig, {"num_local_experts": EXPERTS, "intermediate_size": 12}),
    "deepseek_v3": (DeepseekV3ForCausalLM, DeepseekV3Config, {"intermediate_size": 24} | _DEEPSEEK),
}

ADAPTER = {
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["o_proj"],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    "task_type": "CAUSAL_LM",
}


def tiny(name, seed=0, experts="eager", **settings):  # torch's grouped_mm has no float64
    kind, config, sizes = MODELS[name]
    torch.manual_seed(seed)
    if name == "gpt_oss":  # its default scales positions for 4,096 tokens and more
        sizes = sizes | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "head_dim": 8}
    model = kind._from_config(
        config(**_SIZES | sizes | settings), attn_implementation="eager", experts_implementation=experts
    )
    return model.eval()


def fused(name, dtype=torch.float64, **settings):
    """The model with an adapter of its fused experts."""
    return with_lora(tiny(name), dtype=dtype, **ADAPTER | settings)


class SeparateExperts(nn.Module):
    """The experts of a layer, as linear layers."""

    def __init__(self, experts):
        super().__init__()
        transposed = getattr(experts, "is_transposed", False)
        self.gate = getattr(experts, "_apply_gate", None)
        for name in ("gate_up", "down"):
            weights, biases = getattr(experts, f"{name}_proj"), getattr(experts, f"{name}_proj_bias", None)
            layers = nn.ModuleList()
            for number, weight in enumerate(weights.detach()):
                weight = weight.mT if transposed else weight
                layer = nn.Linear(weight.shape[1], weight.shape[0], bias=biases is not None)
                layer.weight.data = weight.clone()
                if biases is not None:
                    layer.bias.data = biases[number].detach().clone()
                layers.append(layer)
            setattr(self, name, layers)

    def forward(self, hidden, indices, weights):
        output = torch.zeros_like(hidden)
        chosen = one_hot(indices, len(self.down))
        for expert, (gate_up, down) in enumerate(zip(self.gate_up, self.down, strict=True)):
            token, place = torch.where(chosen[..., expert] > 0)
            if len(token):
                inner = gate_up(hidden[token])
                if self.gate is not None:
                    inner = self.gate(inner)
                else:
                    gate, up = inner.chunk(2, dim=-1)
                    inner = nn.functional.silu(gate) * up
                output = output.index_add(0, token, down(inner) * weights[token, place, None])
        return output


def separate(name, like, dtype=torch.float64, **settings):
    """The model with each expert a linear layer, and `like`'s factors."""
    base = tiny(name)
    for module in list(base.modules()):
        if hasattr(module, "experts"):
            module.experts = SeparateExperts(module.experts)
    targets = [n for n, m in base.named_modules() if re.fullmatch(r".*\.(o_proj|gate_up\.\d+|down\.\d+)", n)]
    settings = ADAPTER | {"target_modules": targets, "target_parameters": None} | settings
    model = with_lora(base, dtype=dtype, **settings)
    others = dict(model.named_modules())
    with torch.no_grad():
        for path, layer in like.named_modules():
            if isinstance(layer, ParamWrapper):
                for expert, (A, B) in enumerate(factors_of_experts(layer)):
                    own = others[path_of_expert(path, layer, expert)]
                    own.lora_A["default"].weight.copy_(A)
                    own.lora_B["default"].weight.copy_(B)
            elif path.endswith("o_proj"):
                others[path].load_state_dict(layer.state_dict())
    return model


def path_of_expert(path, layer, expert):
    """Where the separate experts' model has an expert of a fused layer."""
    return f"{path.removesuffix('.base_layer')}.{layer.parameter_name.removesuffix('_proj')}.{expert}"


def factors_of_experts(layer):
    """lora_A and lora_B of each expert, as PEFT lays them out."""
    A, B, count = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach(), layer.num_experts
    r = len(A) // count
    return [(A[e * r : (e + 1) * r], B[:, e::count]) for e in range(count)]


def weights_of_experts(layer):
    """The base weight of each expert, (out, in)."""
    weights = layer.get_param().detach()
    return weights.mT if getattr(layer.get_base_layer(), "is_transposed", False) else weights


def batch(seed, rows=1, length=5):
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def backward(model, seed, **shape):
    tokens = batch(seed, **shape)
    model.zero_grad()
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return loss.item()


def fused_layers(model):
    """The layers of fused experts, by name."""
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, ParamWrapper)}
