"""DeepSeek's multi-head latent attention in a form that can be exported.

DeepSeek-V2 in transformers rotates complex numbers; V3 does the same rotation with real ones, under the same parameter
names. Both write keys into an empty tensor in place, which has no exportable gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

from export.families.family import plain_activations


class Attention(v3.DeepseekV3Attention):  # type: ignore[misc]
    """As in DeepSeek-V3, keys concatenated."""

    def expand_kv(self, kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 1, S, latent] and [B, 1, S, rotary] -> keys and values [B, heads, S, ...]."""
        rows, _, tokens, _ = kv_nope.shape
        shape = (rows, tokens, -1, self.qk_nope_head_dim + self.v_head_dim)
        both = self.kv_b_proj(kv_nope).view(shape).transpose(1, 2)
        k_nope, value = torch.split(both, [self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        return torch.cat((k_nope, k_rot.expand(-1, k_nope.shape[1], -1, -1)), -1), value


def adapt(model: nn.Module) -> None:
    """Replace rotary embedding, attention and activations."""
    plain_activations(model)
    config = model.config
    if not hasattr(config, "rope_interleave"):
        config.rope_interleave = True
    model.model.rotary_emb = v3.DeepseekV3RotaryEmbedding(config)
    with torch.device("meta"):
        for layer in model.model.layers:
            layer.self_attn = Attention(config, layer.self_attn.layer_idx).eval()
