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
from transformers.activations import SiLUActivation

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


class Silu(nn.Module):
    """As `nn.SiLU`, in operations whose gradient ExecuTorch has."""

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise."""
        return x * torch.sigmoid(x)


def plain_activations(model: nn.Module) -> None:
    """Replace every SiLU module."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.SiLU | SiLUActivation):
                setattr(module, name, Silu())


@dataclass(frozen=True, kw_only=True)
class Family:
    """Names and routing rules of one `model_type`. `{layer}` and `{expert}` are filled in.

    Attributes
    ----------
    fused : projection -> the 3-D tensor that holds all experts of a layer, [E, out, in]
    split : projection -> the expert's own tensors, stacked along the output. A checkpoint has one or the other
    router : name of the router's weight [E, d]
    aliases : (part of a name in the model, what checkpoints may have there instead)
    router_extra : name -> further tensor of the checkpoint with one row per expert, such as a selection bias [E]
    router_made : config -> the same, computed instead of read, such as each expert's group
    block : path of the sparse block inside the model, which `RoutedExperts` replaces
    route : (logits [T, P], rows of `router_extra` [P, ...], config) -> weights and slots of a token's experts [T, k].
        Absent experts are not there: they are masked out
    renormalises : whether `route` divides a token's k weights by their sum
    probabilities : (logits [T, E], config) -> the router's distribution g, rows sum to 1, for statistics
    shared : (the original block, hidden [B, S, d]) -> what every token gets beside its experts, or None. Its parameters
        are dense: always resident
    activation : config -> silu | gelu | gelu_tanh | relu
    fresh_router : (layer, config) -> our own router [E, d], where the checkpoint has none; `router` is then not used
    adapt : called on the skeleton; puts modules that can be exported where transformers has others. Names stay
    logits : (what the head gives, config) -> logits, for families that scale or cap them
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
    aliases: tuple[tuple[str, str], ...] = ()
    router_extra: dict[str, str] = field(default_factory=dict)
    router_made: Callable[[Config], dict[str, Tensor]] = lambda config: {}
    renormalises: Callable[[Config], bool] = lambda config: False
    probabilities: Callable[[Tensor, Config], Tensor] = lambda logits, config: F.softmax(logits, -1)
    shared: Callable[[nn.Module, Tensor], Tensor] | None = None
    activation: Callable[[Config], str] = lambda config: config["hidden_act"]
    adapt: Callable[[nn.Module], None] = plain_activations
    logits: Callable[[Tensor, Config], Tensor] = lambda logits, config: logits
    projections: tuple[str, ...] = ("gate_up", "down")
    architecture: str = "causal"
    hidden: Callable[[Config], int] = lambda config: int(config["hidden_size"])
    fresh_router: Callable[[int, Config], NDArray[np.float32]] | None = None


def key(*keys: str) -> Callable[[Config], Any]:
    """Reads the first of `keys` that a config has: transformers knows some by two names.

    >>> key("num_experts", "num_local_experts")({"num_local_experts": 8})
    8
    """
    return lambda config: next(config[name] for name in keys if name in config)


def every_layer(config: Config) -> tuple[int, ...]:
    """All decoder layers hold experts."""
    return tuple(range(config["num_hidden_layers"]))


def from_layer(first: str) -> Callable[[Config], tuple[int, ...]]:
    """All decoder layers from `config[first]` on hold experts."""
    return lambda config: tuple(range(config[first], config["num_hidden_layers"]))


def every_nth_layer(config: Config) -> tuple[int, ...]:
    """Qwen's rule: every `decoder_sparse_step`-th layer, less `mlp_only_layers`.

    >>> every_nth_layer({"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]})
    (1, 5)
    """
    step, dense = config["decoder_sparse_step"], set(config["mlp_only_layers"] or ())
    return tuple(
        layer
        for layer in range(config["num_hidden_layers"])
        if (layer + 1) % step == 0 and layer not in dense
    )


def fused(block: str) -> dict[str, str]:
    """The tensors in which transformers 5 holds the experts of `block`."""
    return {
        "gate_up": f"{block}.experts.gate_up_proj",
        "down": f"{block}.experts.down_proj",
    }


def split(block: str, gate: str, up: str, down: str) -> dict[str, tuple[str, ...]]:
    """One module per expert and projection, as checkpoints have them."""
    prefix = f"{block}.experts.{{expert}}"
    return {
        "gate_up": (f"{prefix}.{gate}.weight", f"{prefix}.{up}.weight"),
        "down": (f"{prefix}.{down}.weight",),
    }


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
