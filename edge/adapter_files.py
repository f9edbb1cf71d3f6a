"""An adapter directory -> the tensors of the resident experts by global names: the server's own form, or stock PEFT's.

Letters: E experts, R the adapter's rank, r a slot's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.decode import GenerateError
from edge.session import FloatArrays, Resident
from protocol import lora, names, tensors
from protocol.manifest import BaseIndex, PeftLayout, Shape

OWN, PEFT, PEFT_CONFIG = "adapter.safetensors", "adapter_model.safetensors", "adapter_config.json"
_HASH = re.compile(r"content hash ([0-9a-f]{64})")
Arrays = Mapping[str, NDArray[Any]]


def read_adapter(
    folder: Path, base: BaseIndex, shape: Shape, resident: Resident, routers: Mapping[int, Any]
) -> FloatArrays:
    """What the residents take from the adapter in `folder`.

    Parameters
    ----------
    routers : layer -> the base's own router rows [E, d]; PEFT saves moved rows, we take what they moved by

    Returns
    -------
    Global name -> float32; `lora_A` [r, in] and `lora_B` [out, r] filled up with zeros from R to r.

    Raises
    ------
    GenerateError
        No adapter there, one of another base, or one of a larger rank than the slots.
    """
    if not folder.is_dir():
        raise GenerateError(f"{folder}: no such directory")
    _same_base(folder, base)
    try:
        if (folder / OWN).is_file():
            found: Arrays = tensors.mapped(folder / OWN)
        elif (folder / PEFT).is_file() and base.peft is not None:
            found = _from_peft(folder, base, base.peft, resident, routers)
        else:
            raise GenerateError(f"{folder}: neither {OWN} nor {PEFT} of this kind of base in it")
    except tensors.TensorError as error:
        raise GenerateError(str(error)) from error
    adapter: FloatArrays = {}
    for (layer, ids), kinds in zip(resident.items(), shape.slots, strict=True):
        for expert, slot in zip(ids, kinds, strict=True):
            for projection in base.projections:
                out, features = base.features(projection)
                a, b = (names.lora(layer, expert, projection, factor) for factor in names.FACTORS)
                rank = _value(found, a, folder, (None, features)).shape[0]
                if rank > slot.rank:
                    raise GenerateError(
                        f"{folder}: rank {rank}, the program holds at most {slot.rank} "
                        f"(export.inference --rank {rank})"
                    )
                more = slot.rank - rank
                adapter[a] = np.pad(found[a], ((0, more), (0, 0)))
                adapter[b] = np.pad(_value(found, b, folder, (out, rank)), ((0, 0), (0, more)))
            row = names.router_row(layer, expert)
            adapter[row] = _value(found, row, folder, (base.hidden,))
    return adapter


def _value(
    found: Arrays, name: str, folder: Path, wanted: tuple[int | None, ...]
) -> NDArray[np.float32]:
    value = found.get(name)
    if value is None:
        raise GenerateError(f"{folder}: adapter of another base, {name} is missing")
    fits = value.ndim == len(wanted) and all(
        w in (None, n) for w, n in zip(wanted, value.shape, strict=True)
    )
    if not fits or value.dtype != np.float32:
        size = [w or "R" for w in wanted]
        raise GenerateError(
            f"{folder}: adapter of another base, {name} is {value.dtype} {list(value.shape)}, "
            f"float32 {size} wanted".replace("'", "")
        )
    if not np.isfinite(value).all():
        raise GenerateError(f"{folder}: {name} is not finite")
    return value


def _same_base(folder: Path, base: BaseIndex) -> None:
    """Compare with the base that the adapter's card names, where there is one."""
    try:
        card = (folder / "README.md").read_text(encoding="utf-8", errors="replace")[:65536]
    except OSError:
        return
    found = _HASH.search(card)
    if found and found[1] != base.base:
        raise GenerateError(
            f"{folder}: adapter of base {found[1][:12]}, the artifact is of base {base.base[:12]}"
        )


def _from_peft(
    folder: Path,
    base: BaseIndex,
    layout: PeftLayout,
    resident: Resident,
    routers: Mapping[int, Any],
) -> FloatArrays:
    """Global names of the residents out of PEFT's state dict; `server/peft_adapter.py` writes the inverse."""
    state = tensors.mapped(folder / PEFT)
    rank, scale = _rank_and_scale(folder / PEFT_CONFIG)

    def value(template: str, layer: int, expert: int, wanted: tuple[int, ...]) -> NDArray[Any]:
        return _value(state, layout.key(template, layer, expert), folder, wanted)

    found: FloatArrays = {}
    for layer, ids in resident.items():
        gate = value(layout.router, layer, 0, (base.num_experts, base.hidden))
        for expert in ids:
            for projection in base.projections:
                out, features = base.features(projection)
                key_a, key_b = (layout.lora[projection][factor] for factor in names.FACTORS)
                if "{expert}" in key_a:
                    a = value(key_a, layer, expert, (rank, features))
                    b = value(key_b, layer, expert, (out, rank))
                else:
                    count = base.num_experts * rank
                    a = value(key_a, layer, 0, (count, features))[
                        expert * rank : (expert + 1) * rank
                    ]
                    b = value(key_b, layer, 0, (out, count))[:, expert :: base.num_experts]
                found[names.lora(layer, expert, projection, "lora_A")] = a
                found[names.lora(layer, expert, projection, "lora_B")] = b * np.float32(scale)
            found[names.router_row(layer, expert)] = gate[expert] - routers[layer][expert]
    return found


def _rank_and_scale(path: Path) -> tuple[int, float]:
    """R, and PEFT's factor over ours."""
    try:
        config = json.loads(path.read_bytes())
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        if rank < 1 or config.get("use_rslora"):
            raise ValueError(f"rank {rank}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise GenerateError(f"{path}: no LoRA configuration that is known: {error}") from error
    return rank, alpha / rank / lora.SCALE
