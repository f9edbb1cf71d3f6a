"""The global adapter of an FFT-MoE base as a directory that `export.fft_adapter.load` puts into a transformers model.

Letters: E experts, h expert width, d hidden. Layout: `protocol.fft_moe`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protocol import fft_moe, names, schema, tensors
from protocol.manifest import BaseIndex


def fft_files(
    adapter: Mapping[str, NDArray[np.float32]],
    routers: Mapping[int, NDArray[Any]],
    base: BaseIndex,
    *,
    version: int,
    base_name: str,
) -> dict[str, bytes]:
    """File name -> content of the directory.

    Parameters
    ----------
    adapter : global names -> float32
    routers : layer -> base router rows [E, d]
    base_name : what to call the dense model
    """
    state: dict[str, NDArray[np.float32]] = {}
    for layer in base.moe_layers:
        change = np.stack([adapter[names.router_row(layer, e)] for e in range(base.num_experts)])
        state[f"layers.{layer}.router"] = routers[layer].astype(np.float32) + change
        for expert in range(base.num_experts):
            for factor in names.FACTORS:
                key = names.lora(layer, expert, "adapter", factor)
                state[key] = adapter[key]
    config = fft_moe.FftAdapter(
        format="expertfleet-fft-moe-1",
        model_type=base.model_type,
        base_model_name_or_path=base_name,
        experts=base.num_experts,
        top_k=base.top_k,
        layers=base.moe_layers,
    )
    return {
        fft_moe.TENSORS: tensors.encode(state),
        fft_moe.CONFIG: json.dumps(schema.to_dict(config), indent=2).encode() + b"\n",
        "README.md": _card(base, version, base_name).encode(),
    }


def _card(base: BaseIndex, version: int, base_name: str) -> str:
    return f"""---
base_model: {base_name}
---
Adapter experts (FFT-MoE) of a federated run, version {version}. Base: {base_name} ({base.model_type}, content hash
{base.base}). {base.num_experts} experts beside every feed-forward block, {base.top_k} per token. Trained on devices; no
text left them. PEFT has no such layer: load with `export.fft_adapter.load(model, this_directory)`.
"""
