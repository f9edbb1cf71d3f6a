"""What the export needs to know of a model family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from protocol.manifest import PeftLayout


@dataclass(frozen=True, kw_only=True)
class Family:
    """Names and routing rules of one `model_type`. `{layer}` and `{expert}` are filled in.

    `fused` maps a projection to the 3-D tensor that holds all experts of a layer ([E, out, in]); `split` to the
    per-expert tensors that are stacked along the output to make it. A checkpoint has one or the other.
    """

    model_type: str
    fused: dict[str, str]
    split: dict[str, tuple[str, ...]]
    router: str
    block: str  # path of the sparse block inside the causal model, replaced by RoutedExperts
    num_experts: Callable[[dict[str, Any]], int]
    top_k: Callable[[dict[str, Any]], int]
    intermediate: Callable[[dict[str, Any]], int]
    moe_layers: Callable[[dict[str, Any]], tuple[int, ...]]
    renormalise: Callable[[dict[str, Any]], bool]
    peft: PeftLayout


def every_layer(config: dict[str, Any]) -> tuple[int, ...]:
    """All decoder layers hold experts."""
    return tuple(range(config["num_hidden_layers"]))


def peft_layout(
    experts: str, router: str, save: str, base_model_class: str, parent_library: str
) -> PeftLayout:
    """PEFT's names when LoRA targets the fused `gate_up_proj` and `down_proj` of module `experts`.

    PEFT wraps a module once per target parameter, the first innermost: hence `base_layer` for gate_up.
    """
    prefix = "base_model.model."
    return PeftLayout(
        target_parameters=(f"{_tail(experts)}.gate_up_proj", f"{_tail(experts)}.down_proj"),
        modules_to_save=(save,),
        lora={
            "gate_up": {
                "lora_A": f"{prefix}{experts}.base_layer.lora_A.weight",
                "lora_B": f"{prefix}{experts}.base_layer.lora_B.weight",
            },
            "down": {
                "lora_A": f"{prefix}{experts}.lora_A.weight",
                "lora_B": f"{prefix}{experts}.lora_B.weight",
            },
        },
        router=f"{prefix}{router}",
        base_model_class=base_model_class,
        parent_library=parent_library,
    )


def _tail(path: str) -> str:
    return path.split("{layer}.", 1)[1]
