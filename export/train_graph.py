"""The graphs of a sub-MoE: one training step (forward, loss, backward) and one evaluation, weights as inputs.

Letters: B batch rows, S tokens per row, K answer positions per row, P slots of a layer, V vocabulary.
Which inputs, in which order and of which shape: `protocol.manifest.Program`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram, export
from torch.export.experimental import _export_forward_backward
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM

from export import graph_passes
from export.families.family import Family
from export.routed_experts import RoutedExperts
from protocol.manifest import BaseIndex, Shape, TensorSpec

BLOCK_ROWS = 64  # fewer blocks dequantise less, more rows compute more: about even from 32 to 64
PACKED = ("gate_up.packed", "gate_up.scale", "down.packed", "down.scale")
STATISTICS = ("mass", "top", "g_log_g", "missed", "output_norm")


def skeleton(base: BaseIndex) -> nn.Module:
    """The transformers model without weights: every parameter on the meta device, buffers real."""
    config = AutoConfig.for_model(**base.config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


def dense_names(model: nn.Module, base: BaseIndex, family: Family) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that is neither expert nor router; a tied head is not listed."""
    blocks = tuple(family.block.format(layer=layer) + "." for layer in base.moe_layers)
    routed = {family.router.format(layer=layer) for layer in base.moe_layers}
    experts = tuple(f"{block}experts." for block in blocks)
    tied = {"lm_head.weight"} if base.config.get("tie_word_embeddings") else set()
    return {
        name: tuple(p.shape)
        for name, p in model.named_parameters(remove_duplicate=False)
        if not name.startswith(experts) and name not in routed and name not in tied
    }


class SubModel(nn.Module):
    """The sub-MoE with one `RoutedExperts` per MoE layer and everything frozen as an input.

    `names` gives the meaning of the positional inputs of `forward`.
    """

    def __init__(self, base: BaseIndex, family: Family, shape: Shape, evaluate: bool) -> None:
        super().__init__()
        model = skeleton(base)
        dense = dense_names(model, base, family)
        self.batch_rows, self.answers, self.evaluate = shape.batch, shape.answers, evaluate
        self.head = "lm_head.weight" if "lm_head.weight" in dense else "model.embed_tokens.weight"
        layers = {}
        for layer, slots in zip(base.moe_layers, shape.slots, strict=True):
            experts = RoutedExperts(
                slots,
                base.hidden,
                base.intermediate,
                shape.rank,
                base.top_k,
                family.renormalise(base.config),
                BLOCK_ROWS,
            )
            path, _, leaf = family.block.format(layer=layer).rpartition(".")
            setattr(model.get_submodule(path), leaf, experts)
            layers[str(layer)] = experts
        self.trained = {
            f"layers.{layer}.{name}": tuple(p.shape)
            for layer, experts in layers.items()
            for name, p in experts.named_parameters()
        }
        # Of the whole model only the adapter is a parameter of the graph, and in evaluation nothing is.
        self.__dict__["model"], self.__dict__["parts"] = model, layers
        self.paths = {layer: family.block.format(layer=layer) for layer in base.moe_layers}
        if not evaluate:
            self.layers = nn.ModuleDict(layers)
        self.specs = _input_specs(base, shape, dense, self.trained if evaluate else None)
        self.names = [spec.name for spec in self.specs]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Outputs as `Program.outputs` lists them."""
        given = dict(zip(self.names, inputs, strict=True))
        for layer, experts in self.parts.items():
            prefix = f"layers.{layer}."
            experts.wires.given = {
                "valid": given["valid"],
                **{n[len(prefix) :]: t for n, t in given.items() if n.startswith(prefix)},
            }
        weights = {n[6:]: t for n, t in given.items() if n.startswith("dense.")}
        if self.evaluate:
            for layer, path in self.paths.items():
                weights |= {
                    f"{path}.{name}": given[f"layers.{layer}.{name}"]
                    for name, _ in self.parts[str(layer)].named_parameters()
                }
        # The head is ours: logits are only needed at the answer positions.
        body = {n.removeprefix("model."): t for n, t in weights.items() if n.startswith("model.")}
        hidden = functional_call(
            self.model.model, body, (), {"input_ids": given["tokens"], "use_cache": False}
        ).last_hidden_state
        flat = hidden.reshape(-1, hidden.shape[-1])
        places = torch.arange(flat.shape[0]).unsqueeze(0)
        pick = (given["positions"].reshape(-1, 1) == places).to(flat.dtype)  # [B*K, B*S]
        answers = torch.mm(pick, flat)
        logits = torch.mm(weights[self.head], answers.t()).t()
        if self.evaluate:
            return (
                logits.reshape(self.batch_rows, self.answers, -1),
                *(experts.wires.seen[s] for experts in self.parts.values() for s in STATISTICS),
            )
        logp = F.log_softmax(logits, -1)
        share = given["weights"].reshape(-1, 1)
        nll = -logp.gather(1, given["targets"].reshape(-1, 1))
        loss = (nll * share).sum() / share.sum().clamp(min=1e-9)
        return loss, *(experts.wires.seen["routed"].detach() for experts in self.parts.values())

    def output_names(self) -> tuple[str, ...]:
        """What `forward` returns, by name."""
        wanted = STATISTICS if self.evaluate else ("routed",)
        first = "logits" if self.evaluate else "loss"
        return (first, *(f"layers.{layer}.{s}" for layer in self.parts for s in wanted))


def _input_specs(
    base: BaseIndex,
    shape: Shape,
    dense: dict[str, tuple[int, ...]],
    adapter: dict[str, tuple[int, ...]] | None,
) -> list[TensorSpec]:
    """Inputs in calling order; `adapter` is given when it is an input as well (evaluation)."""
    rows, groups = (shape.batch, shape.sequence), shape.group
    asked = (shape.batch, shape.answers)
    specs = [
        TensorSpec(name="tokens", shape=rows, dtype="int64"),
        TensorSpec(name="valid", shape=rows, dtype="float32"),
        TensorSpec(name="positions", shape=asked, dtype="int64"),
        TensorSpec(name="targets", shape=asked, dtype="int64"),
        TensorSpec(name="weights", shape=asked, dtype="float32"),
    ]
    specs += [TensorSpec(name=f"dense.{n}", shape=s, dtype="float32") for n, s in dense.items()]
    for layer, slots in zip(base.moe_layers, shape.slots, strict=True):
        up, down = base.features("gate_up"), base.features("down")
        prefix = f"layers.{layer}."
        layer_specs = [("router_rows", (slots, base.hidden), "float32")]
        if adapter is not None:
            layer_specs += [
                ("router_all", (base.num_experts, base.hidden), "float32"),
                ("resident", (base.num_experts,), "float32"),
            ]
        for name, (out, into) in (("gate_up", up), ("down", down)):
            layer_specs += [
                (f"{name}.packed", (slots * out, into // 2), "uint8"),
                (f"{name}.scale", (slots * out, into // groups), "float32"),
            ]
        specs += [TensorSpec(name=prefix + n, shape=s, dtype=t) for n, s, t in layer_specs]
    if adapter is not None:
        specs += [TensorSpec(name=n, shape=s, dtype="float32") for n, s in adapter.items()]
    return specs


def example(specs: Sequence[TensorSpec]) -> tuple[Tensor, ...]:
    """Zeros of the right shapes: untouched memory, so that tracing a real model costs none."""
    return tuple(torch.zeros(s.shape, dtype=getattr(torch, np.dtype(s.dtype).name)) for s in specs)


def capture_training(model: SubModel) -> ExportedProgram:
    """Joint forward and backward graph, rewritten by `graph_passes`."""
    program = _export_forward_backward(export(model, example(model.specs), strict=False))
    graph_passes.gather_backward(program)
    graph_passes.keep_weights_untransposed(program)
    graph_passes.simplify(program)
    graph_passes.recompute_cheap(program)
    graph_passes.recompute_dequantisation(program)
    return program


def capture_evaluation(model: SubModel) -> ExportedProgram:
    """Forward graph with statistics."""
    with torch.no_grad():
        program = export(model, example(model.specs), strict=False)
    program = program.run_decompositions()
    graph_passes.simplify(program)
    return program


CAPTURE: dict[str, Callable[[SubModel], Any]] = {
    "train": capture_training,
    "evaluate": capture_evaluation,
}
