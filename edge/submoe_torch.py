"""A sub-MoE as an ordinary transformers model with stock PEFT LoRA, built from the blobs on the device.

The slow reference: it knows the blobs, the names and the LoRA layout, and nothing of the exported programs.
Letters: E experts, P slots of a layer, R rank, d hidden, T tokens.
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

from edge import slots
from edge.session import Artifact, Resident, SessionError
from protocol import int4, lora, names
from protocol.manifest import Blob


class Moved(nn.Module):  # type: ignore[misc]
    """A frozen router plus a trained change, [P, d]."""

    def __init__(self, rows: int, hidden: int) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(rows, hidden))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The moved rows."""
        return weight + self.delta


@dataclass
class MoeBlock:
    """The parts of one MoE layer: where tokens are routed, what to, and the wrapper PEFT put around that."""

    gate: nn.Module
    experts: nn.Module
    outer: nn.Module
    delta: nn.Parameter


@dataclass
class SubMoe:
    """The model (`body` gives hidden states, `head` logits), its MoE blocks by layer, and its trained arrays."""

    body: nn.Module
    head: nn.Module
    blocks: dict[int, MoeBlock]
    trained: dict[str, nn.Parameter]
    router_all: dict[int, NDArray[np.float32]]


def read_blob(artifact: Artifact, blob: Blob) -> dict[str, NDArray[Any]]:
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
        When a blob does not fit the model class.
    """
    base, rank = artifact.base, artifact.manifest.shape.rank
    dense = read_blob(artifact, base.dense)
    try:
        packed = slots.expert_inputs(base, resident, lambda blob: read_blob(artifact, blob))
        routers = slots.router_inputs(dense, resident)
    except slots.SlotError as error:
        raise SessionError(str(error)) from error
    config = AutoConfig.for_model(**base.config)
    # Routers and experts are replaced below; as few as possible are made for nothing.
    config.num_experts = config.num_experts_per_tok
    config.dtype = torch.float32
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    ).eval()
    _load_dense(model, dense)
    found = _moe_parts(model, base.moe_layers)
    for layer, (gate, experts) in found.items():
        count = len(resident[layer])
        for projection in names.PROJECTIONS:
            weight = int4.dequantize(
                packed[f"layers.{layer}.{projection}.packed"],
                packed[f"layers.{layer}.{projection}.scale"],
            )
            out, features = base.features(projection)
            stacked = torch.from_numpy(weight.reshape(count, out, features))
            setattr(experts, f"{projection}_proj", nn.Parameter(stacked, requires_grad=False))
        rows = torch.from_numpy(routers[f"layers.{layer}.router_rows"].copy())
        gate.weight = nn.Parameter(rows, requires_grad=False)
        experts.num_experts = gate.num_experts = count
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
    blocks, trained = {}, {}
    for layer, (gate, experts) in found.items():
        moved = Moved(len(resident[layer]), base.hidden)
        parametrize.register_parametrization(gate, "weight", moved)
        outer = next(
            parent.experts
            for parent in model.modules()
            if getattr(parent, "experts", None) is not None
            and experts in set(parent.experts.modules())
        )
        blocks[layer] = MoeBlock(gate, experts, outer, moved.delta)
        for wrapper in outer.modules():
            if hasattr(wrapper, "parameter_name"):
                projection = wrapper.parameter_name.removesuffix("_proj")
                trained[f"layers.{layer}.{projection}.a"] = wrapper.lora_A["default"].weight
                trained[f"layers.{layer}.{projection}.b"] = wrapper.lora_B["default"].weight
        trained[f"layers.{layer}.router"] = moved.delta
        if quantise is not None:
            quantise(experts, outer)
    router_all = {layer: routers[f"layers.{layer}.router_all"] for layer in resident}
    return SubMoe(model.model, model.lm_head, blocks, trained, router_all)


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


def _load_dense(model: nn.Module, dense: dict[str, NDArray[Any]]) -> None:
    state = {name: torch.from_numpy(value.astype(np.float32)) for name, value in dense.items()}
    own = dict(model.named_parameters())
    for name, value in state.items():
        if name in own and own[name].shape == value.shape:
            own[name].data.copy_(value)
        elif name in own and ".gate." not in name and ".router." not in name:
            raise SessionError(
                f"dense blob: {name} is {tuple(value.shape)}, {tuple(own[name].shape)} wanted"
            )
    tied = {n for n in own if n == "lm_head.weight"}  # absent from `own` when tied
    missing = [
        n
        for n in own
        if n not in state and "experts" not in n and ".gate." not in n and ".router." not in n
    ]
    if missing:
        raise SessionError(f"dense blob: {missing[0]} is missing{' (untied head)' if tied else ''}")


def slot_view(name: str, value: NDArray[np.float32], rank: int) -> NDArray[np.float32]:
    """PEFT's storage of a trained tensor seen as a slot array: a view, never a copy.

    lora_A.weight [P*R, in] has row p*R + j = A_p[j]; lora_B.weight [out, R*P] has column j*P + p = B_p[:, j].

    >>> slot_view("layers.0.down.a", np.arange(8, dtype=np.float32).reshape(4, 2), 2)[1].tolist()
    [[4.0, 6.0], [5.0, 7.0]]
    """
    if name.endswith(".a"):
        return value.reshape(-1, rank, value.shape[1]).transpose(0, 2, 1)
    if name.endswith(".b"):
        return value.reshape(value.shape[0], rank, -1).transpose(2, 1, 0)
    return value
