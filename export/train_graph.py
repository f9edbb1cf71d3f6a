"""The graphs of a sub-MoE: one training step (forward, loss, backward) and one evaluation, weights as inputs.

Letters: B batch rows, S tokens per row, K answer positions per row, P slots of a layer, V vocabulary.
Which inputs, in which order and of which shape: `protocol.manifest.Program`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram, export
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from export import graph_passes, local_objective, ops, seq2seq
from export.families.family import Family
from export.packed_modules import replace_packed
from export.routed_experts import RoutedExperts
from protocol import packing
from protocol.manifest import BaseIndex, Shape, Slot, TensorSpec

STATISTICS = ("mass", "top", "g_log_g", "missed", "output_norm", "peak", "high")
OF_STEP = ("routed", "kept", "taylor")


def skeleton(base: BaseIndex) -> nn.Module:
    """The transformers model without weights: every parameter on the meta device, buffers real."""
    config = AutoConfig.for_model(**base.config)
    seq2seq = base.architecture == "seq2seq"
    auto = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    attention = "eager" if seq2seq else "expertfleet"
    with torch.device("meta"):
        model = auto.from_config(config, attn_implementation=attention).eval()
    for name, module in list(model.named_modules()):
        # Rotary tables are computed by their constructor, from the configuration alone.
        if name.rpartition(".")[2].startswith("rotary_emb"):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, type(module)(config))
    return model


def dense_names(model: nn.Module, base: BaseIndex, family: Family) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that is neither expert nor router; what is tied to another is not listed."""
    blocks = tuple(family.block.format(layer=layer) + "." for layer in base.moe_layers)
    routers = (family.router, *family.router_extra.values())
    routed = {name.format(layer=layer) for layer in base.moe_layers for name in routers if name}
    experts = tuple(f"{block}experts." for block in blocks)
    tied = set(model._tied_weights_keys or ()) if base.config.get("tie_word_embeddings") else set()
    return {
        name: tuple(p.shape)
        for name, p in model.named_parameters(remove_duplicate=False)
        if not name.startswith(experts) and name not in routed and name not in tied
    }


class SubModel(nn.Module):
    """The sub-MoE with one `RoutedExperts` per MoE layer; every weight, the adapter too, is an input.

    `names` gives the meaning of the positional inputs of `forward`.
    """

    def __init__(self, base: BaseIndex, family: Family, shape: Shape, evaluate: bool) -> None:
        super().__init__()
        model = skeleton(base)
        family.adapt(model)
        dense = dense_names(model, base, family)
        packed = {name: s for name, s in dense.items() if packing.packs(s)}
        self.base, self.family, self.shape, self.evaluate = base, family, shape, evaluate
        self.seq2seq = base.architecture == "seq2seq"
        embedding = f"{model.base_model_prefix}.embed_tokens.weight"
        embedding = seq2seq.EMBEDDING if self.seq2seq else embedding
        self.head = "lm_head.weight" if "lm_head.weight" in dense else embedding
        self.parts: dict[int, RoutedExperts]
        self.__dict__["parts"] = {}
        for layer, slots in zip(base.moe_layers, shape.slots, strict=True):
            path, _, leaf = family.block.format(layer=layer).rpartition(".")
            parent = model.get_submodule(path)
            self.parts[layer] = RoutedExperts(getattr(parent, leaf), family, base, slots)
        self.__dict__["stand_ins"] = replace_packed(model, packed, shape.dense)
        if self.seq2seq:
            seq2seq.tie(model)
        for layer, part in self.parts.items():
            path, _, leaf = family.block.format(layer=layer).rpartition(".")
            setattr(model.get_submodule(path), leaf, part)
            if family.shared is not None:  # its parameters keep their names
                for name, child in part.block.named_children():
                    part.add_module(name, child)
        self.__dict__["model"] = model
        self.adapter = adapter_specs(base, shape)
        self.specs = _input_specs(base, family, shape, dense, evaluate)
        self.names = [spec.name for spec in self.specs]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Outputs as `Program.outputs` lists them."""
        given = dict(zip(self.names, inputs, strict=True))
        if self.evaluate:
            return self._evaluate(given)
        with torch.enable_grad():
            for spec in self.adapter:
                given[spec.name] = given[spec.name].detach().requires_grad_(True)
            loss, objective = self._losses(given)
            parts = list(self.parts.values())
            penalty = torch.stack([part.seen["penalty"] for part in parts]).sum() / len(parts)
            objective = objective + penalty
            wanted = [given[spec.name] for spec in self.adapter]
            wanted += [part.seen["weight"] for part in parts]
            found = torch.autograd.grad(objective, wanted, materialize_grads=True)
            gradients, of_weights = found[: len(self.adapter)], found[len(self.adapter) :]
        seen = []
        for part, gradient in zip(parts, of_weights, strict=True):
            seen += [part.seen["routed"].detach(), part.seen["kept"]]
            seen.append(part.removal_change(gradient))
        return loss, *seen, *gradients

    def bind(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """Hand the inputs to the stand-ins; returns the dense tensors that stay parameters of the model."""
        for layer, part in self.parts.items():
            prefix = f"layers.{layer}."
            own = {n[len(prefix) :]: t for n, t in given.items() if n.startswith(prefix)}
            own |= {n: t for n, t in given.items() if n.startswith("objective.")}
            if self.seq2seq:
                own["valid"] = seq2seq.valid_tokens(layer, given, self.base.config)
            elif "valid" in given:
                own["valid"] = given["valid"]
            part.given = own
        for name, stand_in in self.stand_ins.items():
            stand_in.packed = given[f"dense.{name}.packed"]
            stand_in.scale = given[f"dense.{name}.scale"]
        floats = {n[6:]: t for n, t in given.items() if n.startswith("dense.")}
        return {n: t for n, t in floats.items() if not n.endswith((".packed", ".scale"))}

    def answer(self, hidden: Tensor, given: dict[str, Tensor]) -> Tensor:
        """[N, d] -> logits [N, V]. The head is ours: logits are only needed where they are asked for."""
        if f"dense.{self.head}" in given:
            logits = torch.mm(hidden, given[f"dense.{self.head}"].t())
        else:
            matrix = given[f"dense.{self.head}.packed"], given[f"dense.{self.head}.scale"]
            logits = ops.packed_linear(hidden, *matrix, self.shape.dense, self.base.vocabulary)
        bias = given.get(f"dense.{self.head.removesuffix('weight')}bias")
        logits = logits if bias is None else logits + bias
        return self.family.logits(logits, self.base.config)

    def _logits(self, given: dict[str, Tensor]) -> Tensor:
        """[B * K, V] at the answer positions."""
        floats = self.bind(given)
        if self.seq2seq:
            return self.answer(seq2seq.answers(self.model, floats, given, self.base.config), given)
        return self.answer(self._answers(floats, given), given)

    def _answers(self, floats: dict[str, Tensor], given: dict[str, Tensor]) -> Tensor:
        """Hidden states [B * K, d] at the answer positions."""
        prefix = f"{self.model.base_model_prefix}."
        body = {n.removeprefix(prefix): t for n, t in floats.items() if n.startswith(prefix)}
        hidden = functional_call(
            self.model.base_model, body, (), {"input_ids": given["tokens"], "use_cache": False}
        ).last_hidden_state
        flat = hidden.reshape(-1, hidden.shape[-1])
        places = torch.arange(flat.shape[0]).unsqueeze(0)
        pick = (given["positions"].reshape(-1, 1) == places).to(flat.dtype)  # [B*K, B*S]
        return torch.mm(pick, flat)

    def _losses(self, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Plain, for the report, and smoothed, which has the gradient."""
        targets, weights = given["targets"].reshape(-1, 1), given["weights"].reshape(-1, 1)
        smoothing = given["objective.label_smoothing"]
        bias = given[local_objective.LOGIT_BIAS]
        logits = local_objective.with_bias(self._logits(given), bias, self.shape.answers)
        return local_objective.answer_losses(logits, targets, weights, smoothing)

    def _evaluate(self, given: dict[str, Tensor]) -> tuple[Tensor, ...]:
        logits = self._logits(given).reshape(self.shape.batch, self.shape.answers, -1)
        return (logits, *(part.seen[s] for part in self.parts.values() for s in STATISTICS))

    def output_names(self) -> tuple[str, ...]:
        """What `forward` returns, by name."""
        if self.evaluate:
            return ("logits", *(f"layers.{layer}.{s}" for layer in self.parts for s in STATISTICS))
        seen = (f"layers.{layer}.{s}" for layer in self.parts for s in OF_STEP)
        return ("loss", *seen, *(f"grad.{spec.name}" for spec in self.adapter))


def adapter_specs(base: BaseIndex, shape: Shape) -> list[TensorSpec]:
    """The trained arrays of a shape: flat factors per projection, router rows and the output scale."""
    specs = []
    for layer, slots in zip(base.moe_layers, shape.slots, strict=True):
        rank = sum(slot.rank for slot in slots)
        for projection in base.projections:
            out, features = base.features(projection)
            specs += [
                (f"layers.{layer}.{projection}.a", (rank * features,)),
                (f"layers.{layer}.{projection}.b", (rank * out,)),
            ]
        specs.append((f"layers.{layer}.router", (len(slots), base.hidden)))
        specs.append((f"layers.{layer}.output_scale", (1,)))
    return [TensorSpec(name=n, shape=s, dtype="float32") for n, s in specs]


def packed_specs(name: str, formats: Sequence[str], out: int, features: int) -> list[TensorSpec]:
    """Packed weights one after the other, and their scales."""
    count = sum(packing.packed_bytes(format, out, features) for format in formats)
    scales = len(formats) * out * features // packing.GROUP
    return [
        TensorSpec(name=f"{name}.packed", shape=(count,), dtype="uint8"),
        TensorSpec(name=f"{name}.scale", shape=(scales,), dtype="float16"),
    ]


def _input_specs(
    base: BaseIndex,
    family: Family,
    shape: Shape,
    dense: dict[str, tuple[int, ...]],
    evaluate: bool,
) -> list[TensorSpec]:
    """Inputs in calling order."""
    rows, asked = (shape.batch, shape.sequence), (shape.batch, shape.answers)
    specs = [
        TensorSpec(name="tokens", shape=rows, dtype="int64"),
        TensorSpec(name="valid", shape=rows, dtype="float32"),
        TensorSpec(name="positions", shape=asked, dtype="int64"),
        TensorSpec(name="targets", shape=asked, dtype="int64"),
        TensorSpec(name="weights", shape=asked, dtype="float32"),
    ]
    specs += [] if evaluate else local_objective.specs(base.vocabulary)
    for name, size in dense.items():
        if packing.packs(size):
            specs += packed_specs(f"dense.{name}", [shape.dense], *size)
        else:
            specs.append(TensorSpec(name=f"dense.{name}", shape=size, dtype="float32"))
    for layer, slots in zip(base.moe_layers, shape.slots, strict=True):
        specs += _layer_specs(base, family, f"layers.{layer}.", slots, evaluate)
    return specs + adapter_specs(base, shape)


def _layer_specs(
    base: BaseIndex, family: Family, prefix: str, slots: Sequence[Slot], evaluate: bool
) -> list[TensorSpec]:
    floats: list[tuple[str, tuple[int, ...]]] = [("router_rows", (len(slots), base.hidden))]
    made = {name: tuple(value.shape[1:]) for name, value in family.router_made(base.config).items()}
    for name, rest in (dict.fromkeys(family.router_extra, ()) | made).items():
        floats.append((f"router_rows.{name}", (len(slots), *rest)))
    if evaluate:
        floats += [
            ("router_all", (base.num_experts, base.hidden)),
            ("resident", (base.num_experts,)),
        ]
    else:
        floats.append((local_objective.TARGET, (len(slots),)))
    specs = [TensorSpec(name=prefix + n, shape=s, dtype="float32") for n, s in floats]
    formats = [slot.format for slot in slots if slot.format != "none"]
    for projection in base.projections:
        if formats:
            specs += packed_specs(prefix + projection, formats, *base.features(projection))
    return specs


def example(specs: Sequence[TensorSpec]) -> tuple[Tensor, ...]:
    """Zeros of the right shapes: pages that numpy has only reserved, so that tracing a real model costs no memory."""
    return tuple(torch.from_numpy(np.zeros(s.shape, s.dtype)) for s in specs)


def capture(model: SubModel) -> ExportedProgram:
    """The graph of `model.forward`, backward pass and all, rewritten by `graph_passes`."""
    inputs = example(model.specs)
    with torch.no_grad():
        # Not fake are the rotary tables: constants of the graph.
        trace = make_fx(
            lambda *given: model(*given), tracing_mode="fake", _allow_non_fake_inputs=True
        )
        graph = trace(*inputs)
        program = export(graph, inputs, strict=False).run_decompositions()
    program._example_inputs = None  # later passes copy them
    graph_passes.simplify(program)
    if not model.evaluate:
        graph_passes.recompute_cheap(program)
    return program
