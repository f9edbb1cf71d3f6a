"""The graphs that run a whole model on a device that cannot hold it: one decoder layer, then one expert, at a time.

Which inputs and outputs: `protocol.manifest.Profiling`. No graph knows the slots of a device, so that all shapes with
the same batch, sequence and dense format share them. Layers with the same tensors share one graph: their weights are
inputs. A layer is transformers' own, called through the model's own forward with its neighbours left out, so that
masks, rotary tables and residual factors are the family's.

Letters: B batch rows, S tokens per row, T = B * S, C tokens of an expert at a time, E experts, k experts per token, d
hidden, R rank.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram, export
from torch.func import functional_call

from export import graph_passes, ops
from export.families.family import Family, FamilyError
from export.packed_modules import replace_packed
from export.train_graph import dense_names, example, packed_specs, skeleton
from protocol import packing
from protocol.manifest import BaseIndex, TensorSpec

COLUMNS = 256
"""C: as many tokens as the operator takes at a time (edge/native/product.h)."""
_LAYER = re.compile(r"(.*\blayers\.)(\d+)\.(.*)")


def check(base: BaseIndex) -> None:
    """Raise FamilyError, in one line, for a base that cannot be run layer by layer."""
    if base.architecture != "causal":
        raise FamilyError(
            f"{base.model_type}: only causal bases are profiled layer by layer, "
            f"this one is {base.architecture}"
        )
    if base.projections == ("adapter",):
        raise FamilyError(
            f"{base.model_type}: adapter experts have no frozen weights to stream; "
            "they are profiled where they are resident"
        )


def scale_of(base: BaseIndex) -> float:
    """The factor on the block's output in a layer's residual sum (Granite)."""
    return float(base.config.get("residual_multiplier") or 1.0)


class _Skip(nn.Module):
    """A layer, or norm, that is left out."""

    def forward(self, hidden: Tensor, *arguments: Any, **options: Any) -> Tensor:
        return hidden


class _Gate(nn.Module):
    """Stands in for a sparse block: routes over all experts, remembers what they need, and gives what is shared."""

    def __init__(self, block: nn.Module, family: Family, base: BaseIndex) -> None:
        super().__init__()
        self.__dict__["block"] = (
            block  # only what is shared has parameters, and they keep their names
        )
        self.family, self.base = family, base
        self.given: Mapping[str, Tensor] = {}
        self.seen: tuple[Tensor, ...] = ()

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, S, d] -> the shared experts' part, or zeros."""
        x, config = hidden.reshape(-1, hidden.shape[-1]), self.base.config
        logits = torch.mm(x, self.given["router"].t())
        extra = {n[7:]: t for n, t in self.given.items() if n.startswith("router.")}
        weight, expert = self.family.route(logits, extra, config)
        g = self.family.probabilities(logits, config)
        self.seen = (x, weight, expert, g)
        if self.family.shared is None:
            return torch.zeros_like(hidden)
        return self.family.shared(self.block, hidden)


class EmbedModel(nn.Module):
    """Tokens to the hidden state that enters the first layer."""

    outputs = ("hidden",)

    def __init__(
        self, base: BaseIndex, family: Family, batch: int, sequence: int, format: str
    ) -> None:
        super().__init__()
        model, dense = _skeleton(base, family)
        table = f"{model.base_model_prefix}.embed_tokens.weight"
        dense = {table: dense[table]}
        for layer in range(len(model.base_model.layers)):
            model.base_model.layers[layer] = _Skip()
        model.base_model.norm = _Skip()
        self.specs = [TensorSpec(name="tokens", shape=(batch, sequence), dtype="int64")]
        self.specs += _dense_specs(dense, "", format)
        self.__dict__["body"] = _Body(model, dense, "", format)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Outputs as `outputs` lists them."""
        given = dict(zip((s.name for s in self.specs), inputs, strict=True))
        return (self.body(given, {"input_ids": given["tokens"]}),)


class LayerModel(nn.Module):
    """One decoder layer without its routed experts."""

    def __init__(
        self, base: BaseIndex, family: Family, layer: int, batch: int, sequence: int, format: str
    ) -> None:
        super().__init__()
        model, dense = _skeleton(base, family)
        prefix = f"{place(model).replace('{layer}', str(layer))}"
        dense = {n: s for n, s in dense.items() if n.startswith(prefix)}
        body = model.base_model
        self.__dict__["gate"] = None
        self.outputs: tuple[str, ...] = ("hidden",)
        self.specs = [
            TensorSpec(name="hidden", shape=(batch, sequence, base.hidden), dtype="float32"),
            *_dense_specs(dense, prefix, format),
        ]
        stand_ins = replace_packed(model, _packed(dense), format)
        if layer in base.moe_layers:
            self.outputs += ("x", "weight", "expert", "g")
            self.specs += _router_specs(base, family)
            path, _, leaf = family.block.format(layer=layer).rpartition(".")
            parent = model.get_submodule(path)
            gate = self.__dict__["gate"] = _Gate(getattr(parent, leaf), family, base)
            setattr(parent, leaf, gate)
            for name, child in gate.block.named_children() if family.shared is not None else ():
                gate.add_module(name, child)
        for other in range(len(body.layers)):
            if other != layer:
                body.layers[other] = _Skip()
        body.norm = _Skip()
        body.layers[layer] = _Entry(body.layers[layer])
        self.__dict__["entry"] = body.layers[layer]
        self.__dict__["body"] = _Body(model, dense, prefix, format, stand_ins)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Outputs as `outputs` lists them."""
        given = dict(zip((s.name for s in self.specs), inputs, strict=True))
        if self.gate is not None:
            self.gate.given = given
        self.entry.hidden = given["hidden"]
        hidden = self.body(given, {"inputs_embeds": given["hidden"]})
        return (hidden, *(self.gate.seen if self.gate is not None else ()))


class ExpertModel(nn.Module):
    """One expert with LoRA on C tokens."""

    outputs = ("y", "norms")

    def __init__(self, base: BaseIndex, family: Family, format: str, rank: int) -> None:
        super().__init__()
        self.base, self.format, self.rank = base, packing.FORMATS.index(format), rank
        self.activation = ops.ACTIVATIONS.index(family.activation(base.config))
        self.specs = [TensorSpec(name="x", shape=(COLUMNS, base.hidden), dtype="float32")]
        for projection in base.projections:
            out, features = base.features(projection)
            self.specs += packed_specs(projection, [format], out, features)
        for projection in base.projections:
            out, features = base.features(projection)
            self.specs += [
                TensorSpec(name=f"{projection}.a", shape=(rank * features,), dtype="float32"),
                TensorSpec(name=f"{projection}.b", shape=(out * rank,), dtype="float32"),
            ]

    def forward(self, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        """Outputs as `outputs` lists them."""
        gated = self.base.projections[0] == "gate_up"
        rest = ([self.format], [self.rank], self.activation, self.base.intermediate, gated)
        one, first = torch.ones(COLUMNS, 1), torch.zeros(COLUMNS, 1, dtype=torch.int64)
        y, norms = torch.ops.expertfleet.routed_experts_norms(x, one, first, *weights, *rest)
        return y, norms.reshape(-1)


class _Entry(nn.Module):
    """Calls the layer on a hidden state from outside, whatever its neighbours gave."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.hidden: Tensor | None = None

    def forward(self, hidden: Tensor, *arguments: Any, **options: Any) -> Tensor:
        return self.layer(self.hidden, *arguments, **options)


class _Body:
    """The model between embedding and head, called with weights from outside."""

    def __init__(
        self,
        model: nn.Module,
        dense: Mapping[str, tuple[int, ...]],
        prefix: str,
        format: str,
        stand_ins: dict[str, nn.Module] | None = None,
    ) -> None:
        if stand_ins is None:
            stand_ins = replace_packed(model, _packed(dense), format)
        self.model, self.prefix, self.stand_ins = model, prefix, stand_ins
        self.floats = [name for name in dense if name not in stand_ins]

    def __call__(self, given: Mapping[str, Tensor], arguments: dict[str, Tensor]) -> Tensor:
        """Last hidden state [B, S, d]."""
        for name, stand_in in self.stand_ins.items():
            key = f"dense.{name.removeprefix(self.prefix)}"
            stand_in.packed, stand_in.scale = given[f"{key}.packed"], given[f"{key}.scale"]
        body = {}
        for name in self.floats:
            inside = name.removeprefix(f"{self.model.base_model_prefix}.")
            if self.prefix:  # the layer lies one deeper now
                inside = _LAYER.sub(r"\1\2.layer.\3", inside)
            body[inside] = given[f"dense.{name.removeprefix(self.prefix)}"]
        options = {**arguments, "use_cache": False}
        return functional_call(self.model.base_model, body, (), options).last_hidden_state


def _skeleton(base: BaseIndex, family: Family) -> tuple[nn.Module, dict[str, tuple[int, ...]]]:
    model = skeleton(base)
    family.adapt(model)
    return model, dense_names(model, base, family)


def place(model: nn.Module) -> str:
    """What the names of a layer's tensors begin with, `{layer}` for its number."""
    return f"{model.base_model_prefix}.layers.{{layer}}."


def _packed(dense: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in dense.items() if packing.packs(shape)}


def _dense_specs(
    dense: Mapping[str, tuple[int, ...]], prefix: str, format: str
) -> list[TensorSpec]:
    specs = []
    for name, shape in dense.items():
        key = f"dense.{name.removeprefix(prefix)}"
        if packing.packs(shape):
            specs += packed_specs(key, [format], *shape)
        else:
            specs.append(TensorSpec(name=key, shape=shape, dtype="float32"))
    return specs


def _router_specs(base: BaseIndex, family: Family) -> list[TensorSpec]:
    rest = {n: tuple(v.shape[1:]) for n, v in family.router_made(base.config).items()}
    sizes = {"router": (base.hidden,)}
    sizes |= {f"router.{n}": s for n, s in (dict.fromkeys(family.router_extra, ()) | rest).items()}
    return [
        TensorSpec(name=name, shape=(base.num_experts, *size), dtype="float32")
        for name, size in sizes.items()
    ]


def kinds(base: BaseIndex, family: Family) -> tuple[list[int], tuple[int, ...]]:
    """Decoder layers that need a graph of their own, and for each layer up to the last with experts which it uses.

    Layers are alike when they have the same tensors, the same attention and experts or none.
    """
    model, dense = _skeleton(base, family)
    types = base.config.get("layer_types") or []
    seen: dict[Any, int] = {}
    first: list[int] = []
    found = []
    for layer in range(base.moe_layers[-1] + 1):
        prefix = place(model).replace("{layer}", str(layer))
        module = model.get_submodule(prefix[:-1])
        key = (
            tuple((n.removeprefix(prefix), s) for n, s in dense.items() if n.startswith(prefix)),
            layer in base.moe_layers,
            types[layer] if layer < len(types) else None,
            tuple(
                str(getattr(part, "sliding_window", None))
                for part in module.modules()
                if hasattr(part, "sliding_window")
            ),
        )
        if key not in seen:
            seen[key] = len(first)
            first.append(layer)
        found.append(seen[key])
    return first, tuple(found)


def capture(model: nn.Module, specs: Sequence[TensorSpec]) -> ExportedProgram:
    """The forward graph of one of the models."""
    with torch.no_grad():
        program = export(model, example(specs), strict=False).run_decompositions()
    graph_passes.simplify(program)
    return program
