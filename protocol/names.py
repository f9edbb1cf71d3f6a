"""Global names of everything that is trained: one name per (layer, expert, projection, factor).

Expert ids are global. The slot an expert occupies on a device never leaves the process (see `edge/slots.py`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

PROJECTIONS = ("gate_up", "up", "down", "adapter")
"""gate_up and down of a gated expert, up and down of a plain one (Switch), adapter of an FFT-MoE expert."""
SCAFFOLD = "scaffold."
"""Before the name of a tensor: its control variate (arXiv 1910.06378)."""
Factor = Literal["lora_A", "lora_B"]
FACTORS: tuple[Factor, ...] = ("lora_A", "lora_B")

_LORA = re.compile(
    r"layers\.(\d{1,4})\.experts\.(\d{1,5})\.(gate_up|up|down|adapter)\.(lora_A|lora_B)"
)
_ROUTER = re.compile(r"layers\.(\d{1,4})\.router\.(\d{1,5})")


@dataclass(frozen=True)
class AdapterName:
    """Which (layer, expert) a tensor belongs to; `projection` and `factor` are None for a router row."""

    layer: int
    expert: int
    projection: str | None = None
    factor: str | None = None


def lora(layer: int, expert: int, projection: str, factor: str) -> str:
    """Name of a LoRA factor: `lora_A` is [rank, in], `lora_B` is [out, rank].

    >>> lora(3, 17, "down", "lora_A")
    'layers.3.experts.17.down.lora_A'
    """
    return f"layers.{layer}.experts.{expert}.{projection}.{factor}"


def router_row(layer: int, expert: int) -> str:
    """Name of the change to one router row, [hidden].

    >>> router_row(3, 17)
    'layers.3.router.17'
    """
    return f"layers.{layer}.router.{expert}"


def output_scale(layer: int) -> str:
    """Name of the factor on the output of a layer's experts, [1]; a device keeps its own, it is never sent.

    >>> output_scale(3)
    'layers.3.output_scale'
    """
    return f"layers.{layer}.output_scale"


def parse(name: str) -> AdapterName | None:
    """Inverse of `lora` and `router_row`; None when `name` is neither.

    >>> parse("layers.3.experts.17.down.lora_A")
    AdapterName(layer=3, expert=17, projection='down', factor='lora_A')
    >>> parse("layers.0.router.2").expert
    2
    >>> parse("layers.0.router.2; DROP TABLE") is None
    True
    """
    if match := _LORA.fullmatch(name):
        return AdapterName(int(match[1]), int(match[2]), match[3], match[4])
    if match := _ROUTER.fullmatch(name):
        return AdapterName(int(match[1]), int(match[2]))
    return None
