"""The global adapter as a directory that stock PEFT loads. Layout verified against peft 0.21.2 (see the test).

Letters: E experts, R rank. Where transformers fuses the experts of a layer, so does PEFT: `lora_A` [E*R, in] has row
e*R+j = A_e[j], `lora_B` [out, R*E] has column j*E+e = B_e[:, j] (the expert runs fastest). Where every expert has
modules of its own (Switch), the keys name the expert. Router rows are not LoRA: the whole gate is saved
(`modules_to_save`), base rows plus changes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protocol import lora, names, tensors
from protocol.manifest import BaseIndex, PeftLayout

PEFT_VERSION = "0.21.2"


def peft_tensors(
    adapter: Mapping[str, NDArray[np.float32]],
    routers: Mapping[int, NDArray[Any]],
    base: BaseIndex,
    extra: Mapping[str, NDArray[Any]],
) -> dict[str, NDArray[np.float32]]:
    """PEFT's state dict.

    Parameters
    ----------
    adapter : global names -> float32
    routers : layer -> base router rows [E, hidden]
    extra : `layers.l.router.<name>` -> what the base's router has beside its rows, such as a selection bias
    """
    state: dict[str, NDArray[np.float32]] = {}
    layout, experts = _layout(base), range(base.num_experts)
    for layer in base.moe_layers:
        for projection in base.projections:
            a, b = (
                [adapter[names.lora(layer, e, projection, factor)] for e in experts]
                for factor in names.FACTORS
            )
            key_a, key_b = (layout.lora[projection][factor] for factor in names.FACTORS)
            if "{expert}" in key_a:
                state |= {layout.key(key_a, layer, e): a[e] for e in experts}
                state |= {layout.key(key_b, layer, e): b[e] for e in experts}
            else:
                state[layout.key(key_a, layer)] = np.concatenate(a)
                state[layout.key(key_b, layer)] = np.stack(b, -1).reshape(b[0].shape[0], -1)
        change = np.stack([adapter[names.router_row(layer, e)] for e in experts])
        state[layout.key(layout.router, layer)] = routers[layer].astype(np.float32) + change
        for name, key in layout.router_extra.items():
            rows = extra[f"layers.{layer}.router.{name}"]
            state[layout.key(key, layer)] = np.asarray(rows, dtype=np.float32)
    return state


def _layout(base: BaseIndex) -> PeftLayout:
    """An FFT-MoE base has none: its adapter is written by `fft_adapter`."""
    if base.peft is None:
        raise ValueError(f"PEFT has no adapter experts, which this base ({base.model_type}) has")
    return base.peft


def peft_config(base: BaseIndex, rank: int, base_name: str) -> dict[str, Any]:
    """`adapter_config.json`."""
    layout = _layout(base)
    return {
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        "task_type": None,
        "auto_mapping": {
            "base_model_class": layout.base_model_class,
            "parent_library": layout.parent_library,
        },
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": lora.alpha(rank),
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(layout.target_modules),
        "target_parameters": list(layout.target_parameters),
        "modules_to_save": list(layout.modules_to_save),
    }


def _card(base: BaseIndex, rank: int, version: int, base_name: str) -> str:
    return f"""---
base_model: {base_name}
library_name: peft
---
LoRA adapter of a federated run, version {version}. Base: {base_name} ({base.model_type}, content hash {base.base}).
Rank {rank} on every expert projection of layers {", ".join(map(str, base.moe_layers))}, plus changed router rows.
Trained on devices; no text left them. Load with `PeftModel.from_pretrained(model, this_directory)`.
"""


def peft_files(
    adapter: Mapping[str, NDArray[np.float32]],
    routers: Mapping[int, NDArray[Any]],
    base: BaseIndex,
    *,
    version: int,
    base_name: str,
    extra: Mapping[str, NDArray[Any]] | None = None,
) -> dict[str, bytes]:
    """File name -> content of the directory; `base_name` is what PEFT shall call the base, see also `peft_tensors`."""
    rank = adapter[names.lora(base.moe_layers[0], 0, base.projections[0], "lora_A")].shape[0]
    config = peft_config(base, rank, base_name)
    return {
        "adapter_model.safetensors": tensors.encode(
            peft_tensors(adapter, routers, base, extra or {})
        ),
        "adapter_config.json": json.dumps(config, indent=2, sort_keys=True).encode() + b"\n",
        "README.md": _card(base, rank, version, base_name).encode(),
    }
