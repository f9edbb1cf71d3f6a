"""One file per model family: where transformers keeps its experts and how it routes."""

from __future__ import annotations

import difflib
from typing import Any

from export.families import olmoe
from export.families.family import Family

FAMILIES: dict[str, Family] = {olmoe.FAMILY.model_type: olmoe.FAMILY}


class FamilyError(ValueError):
    """A checkpoint of a class that cannot be sliced."""


def of(config: dict[str, Any], where: str) -> Family:
    """The family of a checkpoint's `config.json`.

    Raises
    ------
    FamilyError
        Naming the class found and the supported ones.
    """
    model_type = str(config.get("model_type"))
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    close = difflib.get_close_matches(model_type, FAMILIES, n=1)
    hint = f", did you mean '{close[0]}'?" if close else ""
    experts = any("expert" in key for key in config)
    what = "a MoE class that is not supported yet" if experts else "not a Mixture-of-Experts model"
    raise FamilyError(
        f"{where}: model_type '{model_type}' is {what}{hint} (supported: {', '.join(sorted(FAMILIES))})"
    )
