"""A sub-MoE as an ordinary transformers model with stock PEFT LoRA, built from the blobs on the device.

The slow reference: it knows the blobs, the names and the LoRA layout, and nothing of the exported programs.
Letters: E experts, P slots of a layer, R the largest rank, r a slot's rank, d hidden, T tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoConfig, AutoModelForCausalLM

from edge.grouped_router_torch import GroupedRouter
from edge.session import Artifact, FloatArrays, Resident, SessionError
from protocol import lora, names, packing
from protocol.manifest import BaseIndex, Blob, Shape

Arrays = dict[str, NDArray[Any]]


class Moved(nn.Module):  # type: ignore[misc]
    """A frozen router plus a trained change, [P, d]; of the slots `kept` only, where these are given."""

    def __init__(self, rows: int, hidden: int) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(rows, hidden))
        self.kept: torch.Tensor | None = None

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The moved rows."""
        moved = weight + self.delta
        return moved if self.kept is None else moved[self.kept]


@dataclass
class MoeBlock:
    """The parts of one MoE layer: where tokens are routed, what to, and the wrapper PEFT put around that.

    `factors` is projection -> PEFT's (lora_A.weight [P * R, in], lora_B.weight [out, R * P]). `bias` and `group` are
    the further rows of the residents' router, for families that have them.
    """

    gate: nn.Module
    experts: nn.Module
    outer: nn.Module
    moved: Moved
    scale: nn.Parameter  # [1], on the experts' output
    factors: dict[str, tuple[nn.Parameter, nn.Parameter]]
    router_all: NDArray[np.float32]
    bias: torch.Tensor | None
    group: torch.Tensor | None

    @property
    def delta(self) -> nn.Parameter:
        """Change of the router rows, [P, d]."""
        return self.moved.delta

    def restrict(self, kept: torch.Tensor | None) -> None:
        """Let the router see these slots only, numbered anew, as it sees only residents anyway; None: all."""
        whole = torch.arange(len(self.delta))
        ids = whole if kept is None else kept
        self.moved.kept = kept
        self.gate.num_experts = len(ids)
        if isinstance(self.gate, GroupedRouter):
            assert self.group is not None
            self.gate.rows(self.group[ids], None if self.bias is None else self.bias[ids])
        elif self.bias is not None:
            self.gate.e_score_correction_bias = self.bias[ids]


@dataclass
class SubMoe:
    """The model (`body` gives hidden states, `head` logits) and its MoE blocks by layer."""

    body: nn.Module
    head: Callable[[torch.Tensor], torch.Tensor]
    blocks: dict[int, MoeBlock]
    resident: Resident
    shape: Shape
    moe_layers: tuple[int, ...]
    sigmoid: bool  # the router's probabilities are sigmoids, not a softmax
    renormalise: bool  # the weights of a token's experts always have the same sum

    def trained(self) -> list[nn.Parameter]:
        """Everything that a step may change."""
        factors = [p for b in self.blocks.values() for pair in b.factors.values() for p in pair]
        return factors + [p for block in self.blocks.values() for p in (block.delta, block.scale)]

    def views(self, array: Callable[[nn.Parameter], NDArray[np.float32]]) -> FloatArrays:
        """Global names -> views of what `array` gives of the parameters, the value or the gradient.

        Rows of PEFT's factors beyond a slot's rank have no name: they are zero, and so stay their gradients.
        """
        found: FloatArrays = {}
        for layer, slots in zip(self.moe_layers, self.shape.slots, strict=True):
            block, count = self.blocks[layer], len(slots)
            for projection, (a, b) in block.factors.items():
                # lora_A.weight has row p * R + j = A_p[j], lora_B.weight column j * P + p = B_p[:, j].
                whole_a, whole_b = array(a), array(b)
                by_slot = whole_a.reshape(count, -1, whole_a.shape[1])
                columns = whole_b.reshape(whole_b.shape[0], -1, count)
                for p, slot in enumerate(slots):
                    if slot.rank:
                        key = (layer, self.resident[layer][p], projection)
                        found[names.lora(*key, "lora_A")] = by_slot[p, : slot.rank]
                        found[names.lora(*key, "lora_B")] = columns[:, : slot.rank, p]
            rows = array(block.delta)
            for p, expert in enumerate(self.resident[layer]):
                found[names.router_row(layer, expert)] = rows[p]
            found[names.output_scale(layer)] = array(block.scale)
        return found

    def probabilities(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """The full router's distribution over all experts [T, E], moved rows included, for hidden states [T, d]."""
        block = self.blocks[layer]
        full = torch.from_numpy(block.router_all.copy())
        full[list(self.resident[layer])] += block.delta.detach()
        return self.distribution(hidden @ full.T)

    def distribution(self, logits: torch.Tensor) -> torch.Tensor:
        """Router logits as shares that sum to 1."""
        if self.sigmoid:
            score = logits.sigmoid()
            return score / score.sum(-1, keepdim=True)
        return logits.softmax(-1)


def read_blob(artifact: Artifact, blob: Blob) -> Arrays:
    """All tensors of a blob; raises SessionError."""
    path = artifact.path(blob)
    try:
        with safe_open(str(path), framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise SessionError(f"{path}: {error}") from error


def build(
    artifact: Artifact,
    resident: Resident,
    quantise: Callable[[nn.Module, nn.Module], None] | None = None,
) -> SubMoe:
    """Build the sub-MoE with zero adapters.

    Parameters
    ----------
    quantise : called with (experts module, its outermost PEFT wrapper) of each layer once LoRA is in place

    Raises
    ------
    SessionError
        When a blob does not fit the model class, or the class is none that this backend can build.
    """
    base, shape = artifact.base, artifact.manifest.shape
    if base.architecture != "causal" or base.projections != ("gate_up", "down") or not base.peft:
        raise SessionError(
            f"backend torch builds gated causal experts, not those of {base.model_type}"
        )
    dense = unpacked(read_blob(artifact, artifact.manifest.dense), shape.dense)
    model = _skeleton(base)
    found = _moe_parts(model, base.moe_layers)
    routers = {layer: router_of(dense, layer, base) for layer in base.moe_layers}
    position = {layer: i for i, layer in enumerate(base.moe_layers)}
    for layer, (gate, experts) in found.items():
        weights = _experts(artifact, resident[layer], position[layer])
        for projection, stacked in weights.items():
            setattr(experts, f"{projection}_proj", nn.Parameter(stacked, requires_grad=False))
        experts.num_experts = len(resident[layer])
        found[layer] = _slice_router(model, gate, routers[layer], resident[layer]), experts
    load_dense(model, dense)
    rank = max(slot.rank for slots in shape.slots for slot in slots)
    wanted = LoraConfig(
        r=rank,
        lora_alpha=lora.alpha(rank),
        target_modules=[],
        target_parameters=list(base.peft.target_parameters),
        bias="none",
    )
    with warnings.catch_warnings():
        # peft 0.21.2 asks transformers 5.23 for a property by its former name.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        get_peft_model(model, wanted).eval()
    blocks = {}
    for layer, (gate, experts) in found.items():
        moved = Moved(len(resident[layer]), base.hidden)
        parametrize.register_parametrization(gate, "weight", moved)
        outer = next(
            parent.experts
            for parent in model.modules()
            if getattr(parent, "experts", None) is not None
            and experts in set(parent.experts.modules())
        )
        factors = {
            wrapper.parameter_name.removesuffix("_proj"): (
                wrapper.lora_A["default"].weight,
                wrapper.lora_B["default"].weight,
            )
            for wrapper in outer.modules()
            if hasattr(wrapper, "parameter_name")
        }
        for pair in factors.values():
            for parameter in pair:
                parameter.data.zero_()
        ids, router = list(resident[layer]), routers[layer]
        extra = [router[name][ids] if name in router else None for name in ("bias", "group")]
        full, scale = router["weight"].numpy(), nn.Parameter(torch.ones(1))
        blocks[layer] = MoeBlock(gate, experts, outer, moved, scale, factors, full, *extra)
        if quantise is not None:
            quantise(experts, outer)
    scaling = getattr(model.config, "logits_scaling", 1.0)
    return SubMoe(
        model.model,
        lambda hidden: model.lm_head(hidden) / scaling,
        blocks,
        resident,
        shape,
        base.moe_layers,
        base.model_type == "deepseek_v3",
        _renormalises(base),
    )


def _renormalises(base: BaseIndex) -> bool:
    """Whether transformers divides a token's weights by their sum; DeepSeek-V2 has the key and does not heed it."""
    if base.model_type in ("mixtral", "granitemoe"):
        return True
    return bool(base.config.get("norm_topk_prob")) and base.model_type != "deepseek_v2"


def _skeleton(base: BaseIndex) -> nn.Module:
    """The transformers model without weights; what is computed from the configuration alone is there."""
    config = AutoConfig.for_model(**base.config)
    config.dtype = torch.float32
    config._experts_implementation = "eager"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


def unpacked(blob: Arrays, format: str) -> dict[str, torch.Tensor]:
    """A dense blob as float32 tensors under the checkpoint's names."""
    weights = {}
    for name, value in blob.items():
        stem, _, part = name.rpartition(".")
        if part == "packed":
            value = packing.dequantize(value, blob[f"{stem}.scale"], format)
            name = stem
        if part != "scale":
            weights[name] = torch.from_numpy(value.astype(np.float32))
    return weights


def _experts(artifact: Artifact, ids: tuple[int, ...], position: int) -> dict[str, torch.Tensor]:
    """projection -> the layer's experts in slot order, [P, out, in]."""
    base, slots = artifact.base, artifact.manifest.shape.slots[position]
    stacked: dict[str, list[torch.Tensor]] = {projection: [] for projection in base.projections}
    for expert, slot in zip(ids, slots, strict=True):
        blob = read_blob(artifact, base.experts[slot.format][position][expert])
        for projection, weights in stacked.items():
            packed, scale = blob[f"{projection}.packed"], blob[f"{projection}.scale"]
            weight = packing.dequantize(packed, scale, slot.format)
            if weight.shape != base.features(projection):
                raise SessionError(
                    f"expert blob of expert {expert}: {projection} is {list(weight.shape)}, "
                    f"{list(base.features(projection))} wanted"
                )
            weights.append(torch.from_numpy(weight))
    return {projection: torch.stack(weights) for projection, weights in stacked.items()}


def router_of(
    dense: dict[str, torch.Tensor], layer: int, base: BaseIndex
) -> dict[str, torch.Tensor]:
    """`weight` [E, d] of a layer's router, and its further rows; they are taken out of `dense`."""
    name = f"layers.{layer}.router"
    if name not in dense:
        raise SessionError(f"dense blob: {name} is missing")
    found = {"weight": dense.pop(name)}
    for key in [key for key in dense if key.startswith(f"{name}.")]:
        found[key.removeprefix(f"{name}.")] = dense.pop(key)
    return found


def _slice_router(
    model: nn.Module, gate: nn.Module, router: dict[str, torch.Tensor], ids: tuple[int, ...]
) -> nn.Module:
    """The router over the residents only: transformers' own with fewer rows, or ours where it has groups."""
    rows = {name: value[list(ids)].clone() for name, value in router.items()}
    if "group" in rows:
        ours = GroupedRouter(model.config, rows["weight"], rows["group"], rows.get("bias"))
        path = next(name for name, module in model.named_modules() if module is gate)
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, ours)
        return ours
    gate.weight = nn.Parameter(rows["weight"], requires_grad=False)
    if "bias" in rows:
        gate.e_score_correction_bias = rows["bias"]
    gate.num_experts = len(ids)
    return gate


def _moe_parts(
    model: nn.Module, moe_layers: tuple[int, ...]
) -> dict[int, tuple[nn.Module, nn.Module]]:
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "gate_up_proj") and isinstance(module.gate_up_proj, nn.Parameter):
            parent = model.get_submodule(name.rpartition(".")[0])
            gate = getattr(parent, "gate", None) or getattr(parent, "router", None)
            layer = next(int(part) for part in name.split(".") if part.isdecimal())
            if gate is None or not hasattr(gate, "weight"):
                raise SessionError(f"{name}: no router beside the experts")
            found[layer] = (gate, module)
    if set(found) != set(moe_layers):
        raise SessionError(f"MoE layers {sorted(found)} in the model, {sorted(moe_layers)} wanted")
    return found


def load_dense(model: nn.Module, dense: dict[str, torch.Tensor]) -> None:
    """Fill what is still on the meta device; raises SessionError when something is left or of another shape."""
    for name, own in list(model.named_parameters()):
        if own.device.type != "meta":
            continue
        value = dense.get(name)
        if value is None or value.shape != own.shape:
            found = "missing" if value is None else f"{list(value.shape)}, {list(own.shape)} wanted"
            raise SessionError(f"dense blob: {name} is {found}")
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Parameter(value, requires_grad=False))
    model.tie_weights()
