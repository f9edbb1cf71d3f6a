"""One file per model family: where transformers keeps its experts and how it routes."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from typing import Any

from transformers import AutoConfig

from export.families import (
    deepseek_v2,
    deepseek_v3,
    fft_moe,
    granitemoe,
    mixtral,
    olmoe,
    phimoe,
    qwen2_moe,
    qwen3_moe,
    switch,
)
from export.families.family import Config, Family, FamilyError

__all__ = ["BUILT", "FAMILIES", "Family", "FamilyError", "complete", "of"]

FAMILIES: dict[str, Family] = {
    module.FAMILY.model_type: module.FAMILY
    for module in (
        olmoe,
        mixtral,
        qwen2_moe,
        qwen3_moe,
        granitemoe,
        deepseek_v2,
        deepseek_v3,
        phimoe,
    )
}
BUILT: dict[str, Callable[[Config, str], Family]] = {switch.MODEL_TYPE: switch.family}
"""Families whose names depend on the configuration."""


def of(config: dict[str, Any], where: str) -> Family:
    """The family of a checkpoint's `config.json`.

    Raises
    ------
    FamilyError
        Naming the class found and the supported ones; or the checkpoint's weights are quantised already.
    """
    model_type = str(config.get("model_type"))
    if "quantization_config" in config:
        raise FamilyError(f"{where}: weights are quantised already; float weights are wanted")
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type in BUILT:
        return BUILT[model_type](config, where)
    if model_type in fft_moe.DENSE:
        if fft_moe.EXPERTS in config:
            return fft_moe.family(config)
        raise FamilyError(
            f"{where}: model_type '{model_type}' has no experts to choose from; "
            "--adapter-experts M trains M small ones beside every block (FFT-MoE)"
        )
    known = sorted((*FAMILIES, *BUILT))
    close = difflib.get_close_matches(model_type, known, n=1)
    hint = f", did you mean '{close[0]}'?" if close else ""
    experts = any("expert" in key for key in config)
    what = "a MoE class that is not supported yet" if experts else "not a Mixture-of-Experts model"
    raise FamilyError(
        f"{where}: model_type '{model_type}' is {what}{hint} (supported: {', '.join(known)}; "
        f"with --adapter-experts also {', '.join(fft_moe.DENSE)})"
    )


def complete(config: dict[str, Any], where: str) -> dict[str, Any]:
    """A supported `config.json` with every default of its class filled in, under the names transformers 5 uses.

    Raises
    ------
    FamilyError
        transformers refuses it.
    """
    try:
        whole = AutoConfig.for_model(**config)
        text = whole.to_json_string(use_diff=False)
    except Exception as error:  # transformers validates with a dozen classes of its own
        reason = " ".join(str(error).split())[:300]
        raise FamilyError(f"{where}: config.json: {reason}") from error
    return dict(json.loads(text))
