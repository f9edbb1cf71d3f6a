"""What the export needs to know of a model family.

Letters: T tokens, P slots, E experts, k experts per token, d hidden, f expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from protocol.manifest import PeftLayout

Config = dict[str, Any]


class FamilyError(ValueError):
    """A checkpoint of a class that cannot be sliced."""


class Placed(str):
    """A template with `{place}`: the path of the layer's block, where layers of two stacks are numbered through.

    >>> Placed("{place}.mlp", {4: "decoder.block.1"}).format(layer=4)
    'decoder.block.1.mlp'
    """

    places: Mapping[int, str]

    def __new__(cls, template: str, places: Mapping[int, str]) -> Placed:
        """Take the template and layer -> place."""
        made = super().__new__(cls, template)
        made.places = places
        return made

    def format(self, *, layer: int, **more: Any) -> str:
        """The name in that layer."""
        return super().format(layer=layer, place=self.places[layer], **more)


Rows = Mapping[str, Tensor]
Route = Callable[[Tensor, Rows, Config], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Family:
    """Names and routing rules of one `model_type`. `{layer}` and `{expert}` are filled in.

    Attributes
    ----------
    fused : projection -> the 3-D tensor that holds all experts of a layer, [E, out, in]
    split : projection -> the expert's own tensors, stacked along the output to make it. A checkpoint has one or the other
    router : name of the router's weight [E, d]
    router_extra : name -> further tensor of the checkpoint with one row per expert, such as a selection bias [E]
    block : path of the sparse block inside the model, which `RoutedExperts` replaces
    route : (logits [T, P], rows of `router_extra` [P, ...], config) -> weights and slots of each token's experts, [T, k].
        Absent experts are not there, so that they are masked out
    probabilities : (logits [T, E], config) -> the router's distribution g, rows sum to 1, for statistics
    shared : (the original block, hidden [B, S, d]) -> what every token gets beside its experts, or None. Its parameters
        are dense: always resident
    activation : config -> silu | gelu | gelu_tanh | relu
    fresh_router : (layer, config) -> a router of our own [E, d], where the checkpoint has none; `router` is then not used
    """

    model_type: str
    fused: dict[str, str]
    split: dict[str, tuple[str, ...]]
    router: str
    block: str
    num_experts: Callable[[Config], int]
    top_k: Callable[[Config], int]
    intermediate: Callable[[Config], int]
    moe_layers: Callable[[Config], tuple[int, ...]]
    route: Route
    peft: PeftLayout | None
    router_extra: dict[str, str] = field(default_factory=dict)
    probabilities: Callable[[Tensor, Config], Tensor] = lambda logits, config: F.softmax(logits, -1)
    shared: Callable[[nn.Module, Tensor], Tensor] | None = None
    activation: Callable[[Config], str] = lambda config: "silu"
    projections: tuple[str, ...] = ("gate_up", "down")
    architecture: str = "causal"
    hidden: Callable[[Config], int] = lambda config: int(config["hidden_size"])
    fresh_router: Callable[[int, Config], NDArray[np.float32]] | None = None


def every_layer(config: Config) -> tuple[int, ...]:
    """All decoder layers hold experts."""
    return tuple(range(config["num_hidden_layers"]))


def softmax_top_k(top_k: Callable[[Config], int], renormalise: Callable[[Config], bool]) -> Route:
    """Softmax over the resident experts, then the k largest; divided by their sum where the family does that."""

    def route(logits: Tensor, rows: Rows, config: Config) -> tuple[Tensor, Tensor]:
        weight, slot = torch.topk(F.softmax(logits, -1), top_k(config), -1)
        if renormalise(config):
            weight = weight / weight.sum(-1, keepdim=True)
        return weight, slot

    return route


def peft_layout(
    experts: str, router: str, save: str, base_model_class: str, parent_library: str
) -> PeftLayout:
    """PEFT's names when LoRA targets the fused `gate_up_proj` and `down_proj` of module `experts`.

    PEFT wraps a module once per target parameter, the first innermost: hence `base_layer` for gate_up.
    """
    prefix = "base_model.model."
    return PeftLayout(
        target_parameters=(f"{_tail(experts)}.gate_up_proj", f"{_tail(experts)}.down_proj"),
        target_modules=(),
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
