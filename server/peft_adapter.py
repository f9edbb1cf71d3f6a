"""The global adapter as a directory that stock PEFT loads. Layout verified against peft 0.21.2 (see the test).

Letters: E experts, R rank. PEFT fuses the experts of a layer: `lora_A` [E*R, in] has row e*R+j = A_e[j],
`lora_B` [out, R*E] has column j*E+e = B_e[:, j] (the expert runs fastest). Router rows are not LoRA: the whole
gate is saved (`modules_to_save`), base rows plus changes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protocol import lora, names, tensors
from protocol.manifest import BaseIndex

PEFT_VERSION = "0.21.2"


def peft_tensors(
    adapter: Mapping[str, NDArray[np.float32]], routers: Mapping[int, NDArray[Any]], base: BaseIndex
) -> dict[str, NDArray[np.float32]]:
    """PEFT's state dict.

    Parameters
    ----------
    adapter : global names -> float32
    routers : layer -> base router rows [E, hidden]
    """
    state: dict[str, NDArray[np.float32]] = {}
    experts = range(base.num_experts)
    for layer in base.moe_layers:
        for projection in base.projections:
            keys = base.peft.lora[projection]
            a = [adapter[names.lora(layer, e, projection, "lora_A")] for e in experts]
            state[keys["lora_A"].format(layer=layer)] = np.concatenate(a)
            b = np.stack([adapter[names.lora(layer, e, projection, "lora_B")] for e in experts], -1)
            state[keys["lora_B"].format(layer=layer)] = b.reshape(b.shape[0], -1)
        change = np.stack([adapter[names.router_row(layer, e)] for e in experts])
        state[base.peft.router.format(layer=layer)] = routers[layer].astype(np.float32) + change
    return state


def peft_config(base: BaseIndex, rank: int, base_name: str) -> dict[str, Any]:
    """`adapter_config.json`."""
    return {
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        "task_type": None,
        "auto_mapping": {
            "base_model_class": base.peft.base_model_class,
            "parent_library": base.peft.parent_library,
        },
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": lora.alpha(rank),
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [],
        "target_parameters": list(base.peft.target_parameters),
        "modules_to_save": list(base.peft.modules_to_save),
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
) -> dict[str, bytes]:
    """File name -> content of the directory; `base_name` is what PEFT shall call the base."""
    rank = adapter[names.lora(base.moe_layers[0], 0, "gate_up", "lora_A")].shape[0]
    config = peft_config(base, rank, base_name)
    return {
        "adapter_model.safetensors": tensors.encode(peft_tensors(adapter, routers, base)),
        "adapter_config.json": json.dumps(config, indent=2, sort_keys=True).encode() + b"\n",
        "README.md": _card(base, rank, version, base_name).encode(),
    }
