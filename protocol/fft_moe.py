"""Adapter experts (FFT-MoE) as a directory: what the server writes and `export.fft_adapter.load` reads.

    fft_adapter.json          `FftAdapter`
    fft_adapter.safetensors   layers.{l}.router [E, d], base rows plus changes;
                              layers.{l}.experts.{e}.adapter.lora_A [h, d] and .lora_B [d, h]

The output of a block becomes FFN(x) + sum over the `top_k` best experts e of (p_e / their sum) * B_e silu(A_e x), where
p = softmax(router x). Unlike LoRA there is no scale, and the factors are no product: they do not merge into weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BLOCK = "model.layers.{layer}.mlp"
"""The feed-forward module beside which the experts of a layer stand, in every dense class we support."""
CONFIG, TENSORS = "fft_adapter.json", "fft_adapter.safetensors"


@dataclass(frozen=True, kw_only=True)
class FftAdapter:
    """`fft_adapter.json`."""

    format: Literal["expertfleet-fft-moe-1"]
    model_type: str
    base_model_name_or_path: str
    experts: int
    top_k: int
    layers: tuple[int, ...]
    activation: Literal["silu"] = "silu"
