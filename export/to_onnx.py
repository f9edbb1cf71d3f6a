"""The decoding graph as an ONNX model whose weights are the store's own blobs.

torch's exporter writes the graph with three placeholder operators; each is then replaced by what ONNX Runtime has:
`MatMulNBits` and `GatherBlockQuantized` for packed matrices, and for a layer's experts, one after the other, the rows
routed to it (`NonZero`, `Gather`), two `MatMulNBits`, LoRA as `Gemm`, and a `ScatterND` that adds. An expert without
tokens costs a few empty nodes. Initialisers name the safetensors blobs and an offset in them: nothing is stored twice.

Our blobs have the even column in the high nibble, ONNX Runtime wants it in the low one. Instead of another copy of the
weights, the columns of each pair are swapped in the activations.

Letters: T tokens, P slots, k experts a token, n tokens of an expert, d hidden, f expert width, R rank.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import (
    AttributeProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    helper,
    numpy_helper,
)
from onnx.defs import OpSchema
from onnxscript.values import Op, Opset
from torch.export import Dim, ExportedProgram, export

from export import ops
from export.decode_graph import DecodeModel
from export.train_graph import example
from protocol import lora, packing
from protocol.manifest import Blob

OPSET = 20
MICROSOFT = "com.microsoft"
FP32 = 1
"""`accuracy_level` of MatMulNBits: float32 activations. Higher levels round them to 8 bits."""


class OnnxError(ValueError):
    """A shape that has no ONNX form."""


def capture(model: DecodeModel) -> ExportedProgram:
    """The forward graph for any number of tokens."""
    tokens = Dim("T", min=1, max=model.context)
    shapes = ({1: tokens}, *[None] * (len(model.specs) - 1))
    with torch.no_grad():
        return export(model, example(model.specs), strict=False, dynamic_shapes=(shapes,))


_LAYER = ("up_packed", "up_scale", "down_packed", "down_scale", "up_a", "up_b", "down_a", "down_b")
_PLACEHOLDERS: dict[str, tuple[tuple[str, ...], tuple[str, ...], int]] = {
    "packed_linear": (("x", "packed", "scale"), ("format", "out"), 1),
    "packed_embedding": (("ids", "packed", "scale"), ("format", "d"), 1),
    "routed_experts_norms": (
        ("x", "weight", "slot", *_LAYER),
        ("formats", "ranks", "activation", "width", "gated"),
        2,
    ),
}


def _placeholder(name: str) -> Any:
    """A translation of one of our operators into a node of the same name."""
    inputs, attributes, outputs = _PLACEHOLDERS[name]
    kinds = {"formats": OpSchema.AttrType.INTS, "ranks": OpSchema.AttrType.INTS}
    letters = [f"T{i}" for i in range(len(inputs))]
    every = ["tensor(float)", "tensor(float16)", "tensor(uint8)", "tensor(int64)"]
    schema = OpSchema(
        name,
        "expertfleet",
        1,
        inputs=[OpSchema.FormalParameter(i, t) for i, t in zip(inputs, letters, strict=True)],
        outputs=[OpSchema.FormalParameter(f"y{i}", "F") for i in range(outputs)],
        type_constraints=[*((t, every, "") for t in letters), ("F", ["tensor(float)"], "")],
        attributes=[
            OpSchema.Attribute(a, kinds.get(a, OpSchema.AttrType.INT), "") for a in attributes
        ],
    )
    op = Op(Opset("expertfleet", 1), name, schema)

    def translate(*arguments: Any) -> Any:
        values = [int(v) if isinstance(v, bool) else v for v in arguments[len(inputs) :]]
        return op(*arguments[: len(inputs)], **dict(zip(attributes, values, strict=True)))

    return translate


class _Blobs:
    """Initialisers that point into safetensors blobs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._headers: dict[str, tuple[int, dict[str, Any]]] = {}

    def tensor(self, name: str, blob: Blob, key: str, shape: Sequence[int]) -> TensorProto:
        """Tensor `key` of `blob`, of this shape, called `name`."""
        if blob.sha256 not in self._headers:
            with open(self.folder / blob.sha256, "rb") as file:
                size = int.from_bytes(file.read(8), "little")
                self._headers[blob.sha256] = (8 + size, json.loads(file.read(size)))
        start, header = self._headers[blob.sha256]
        entry = header[key]
        begin, end = entry["data_offsets"]
        kinds = {"U8": TensorProto.UINT8, "F16": TensorProto.FLOAT16, "F32": TensorProto.FLOAT}
        tensor = TensorProto(name=name, data_type=kinds[entry["dtype"]], dims=shape)
        assert int(np.prod(shape)) == int(np.prod(entry["shape"])), (key, shape, entry["shape"])
        tensor.data_location = TensorProto.EXTERNAL
        for field, value in (
            ("location", blob.sha256),
            ("offset", start + begin),
            ("length", end - begin),
        ):
            tensor.external_data.add(key=field, value=str(value))
        return tensor

    def array(self, blob: Blob, key: str) -> NDArray[Any]:
        """The values themselves."""
        from safetensors import safe_open

        with safe_open(str(self.folder / blob.sha256), framework="numpy") as file:
            return np.asarray(file.get_tensor(key))


class _Graph:
    """Nodes and initialisers under construction."""

    def __init__(
        self, model: DecodeModel, resident: Mapping[int, Sequence[int]], blobs: _Blobs
    ) -> None:
        self.base, self.shape, self.model = model.base, model.shape, model
        self.resident, self.blobs = resident, blobs
        self.nodes: list[NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}
        self._count = 0

    def node(
        self,
        op: str,
        inputs: Sequence[str],
        outputs: int | Sequence[str] = 1,
        domain: str = "",
        **attributes: Any,
    ) -> Any:
        """Append a node; the name or names of what it gives."""
        if isinstance(outputs, int):
            names = [f"expertfleet_{self._count + i}" for i in range(outputs)]
            self._count += outputs
        else:
            names = list(outputs)
        self.nodes.append(helper.make_node(op, inputs, names, domain=domain, **attributes))
        return names[0] if len(names) == 1 else names

    def constant(self, name: str, value: Any) -> str:
        """Name of a small constant."""
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def external(self, name: str, blob: Blob, key: str, shape: Sequence[int]) -> str:
        """Name of a tensor that lies in a blob."""
        if name not in self.initializers:
            self.initializers[name] = self.blobs.tensor(name, blob, key, shape)
        return name

    def scale(self, name: str, blob: Blob, key: str, shape: Sequence[int]) -> str:
        """A blob's scales as float32, folded when the model is loaded."""
        wide = f"{name}.float"
        if name not in self.initializers:
            self.node("Cast", [self.external(name, blob, key, shape)], [wide], to=TensorProto.FLOAT)
        return wide

    def swapped(self, x: str, width: int, format: str) -> str:
        """`x` with the columns of each pair swapped, for 4-bit weights."""
        if format == "int8":
            return x
        swap = self.constant(f"swap.{width}", np.arange(width, dtype=np.int64) ^ 1)
        return str(self.node("Gather", [x, swap], axis=-1))

    def product(
        self,
        x: str,
        weight: str,
        blob: Blob,
        key: str,
        format: str,
        out: int,
        features: int,
        name: Sequence[str] | int = 1,
    ) -> str:
        """x [..., features] (swapped) times a packed weight [out, features]."""
        bits, groups = packing.BITS[format], features // packing.GROUP
        packed = (out, groups, packing.GROUP * bits // 8)
        inputs = [
            x,
            self.external(f"{weight}.packed", blob, f"{key}.packed", packed),
            self.scale(f"{weight}.scale", blob, f"{key}.scale", (out, groups)),
        ]
        return str(
            self.node(
                "MatMulNBits",
                inputs,
                name,
                MICROSOFT,
                K=features,
                N=out,
                bits=bits,
                block_size=packing.GROUP,
                accuracy_level=FP32,
            )
        )

    def linear(self, node: NodeProto) -> None:
        """Replaces `packed_linear`."""
        name = node.input[1].removeprefix("dense.").removesuffix(".packed")
        out, format = _attribute(node, "out"), self.shape.dense
        features = self.count(node.input[1]) // out
        x = self.swapped(node.input[0], features, format)
        blob = self.base.dense[format]
        self.product(x, f"dense.{name}", blob, name, format, out, features, [node.output[0]])

    def count(self, packed: str) -> int:
        """Weights of a dense matrix."""
        spec = next(spec for spec in self.model.specs if spec.name == packed)
        return spec.shape[0] * 8 // packing.BITS[self.shape.dense]

    def embedding(self, node: NodeProto) -> None:
        """Replaces `packed_embedding`."""
        name = node.input[1].removeprefix("dense.").removesuffix(".packed")
        width, format = _attribute(node, "d"), self.shape.dense
        bits, blob = packing.BITS[format], self.base.dense[format]
        rows = self.count(node.input[1]) // width
        table = self.external(
            f"rows.{name}.packed", blob, f"{name}.packed", (rows, width * bits // 8)
        )
        scale = self.scale(
            f"dense.{name}.scale", blob, f"{name}.scale", (rows, width // packing.GROUP)
        )
        found = self.node(
            "GatherBlockQuantized",
            [table, node.input[0], scale],
            1,
            MICROSOFT,
            bits=bits,
            block_size=packing.GROUP,
            gather_axis=0,
            quantize_axis=1,
        )
        if format == "int8":
            self.node("Identity", [found], [node.output[0]])
        else:
            swap = self.constant(f"swap.{width}", np.arange(width, dtype=np.int64) ^ 1)
            self.node("Gather", [found, swap], [node.output[0]], axis=-1)

    def experts(self, node: NodeProto) -> None:
        """Replaces `routed_experts_norms`."""
        x, weight, slot = node.input[:3]
        layer = int(node.input[3].split(".")[1])
        up, down = self.base.projections
        (out, d), (_, f) = self.base.features(up), self.base.features(down)
        places = self.shape.slots[self.base.moe_layers.index(layer)]
        rank = places[0].rank
        if any(place.rank != rank for place in places):
            raise OnnxError(f"layer {layer}: slots of one rank wanted")
        factors = (
            {
                n: self.node(
                    "Reshape",
                    [
                        name,
                        self.constant(
                            f"shape.{len(places)}.{a}.{b}", np.array([len(places), a, b])
                        ),
                    ],
                )
                for n, name, a, b in zip(
                    _LAYER[4:],
                    node.input[7:11],
                    (rank, out, rank, d),
                    (d, rank, f, rank),
                    strict=True,
                )
            }
            if rank
            else {}
        )
        zero, one = self.constant("zero", np.array(0)), self.constant("one", np.array([1]))
        swapped = self.swapped(x, d, "int4")
        shape = self.node("Shape", [x])
        empty = numpy_helper.from_array(np.zeros(1, np.float32))
        total = self.node("ConstantOfShape", [shape], value=empty)
        for p, (place, expert) in enumerate(zip(places, self.resident[layer], strict=True)):
            if place.format == "nf4":
                raise OnnxError(f"layer {layer}: nf4 slots have no ONNX form, int4 and int8 do")
            blob = self.base.experts[place.format][self.base.moe_layers.index(layer)][expert]
            name, which = (
                f"layers.{layer}.experts.{expert}",
                self.constant(f"slot.{p}", np.array(p)),
            )
            # rows and places [2, n] of the assignments to this slot
            assigned = self.node("NonZero", [self.node("Equal", [slot, which])])
            rows = self.node("Gather", [assigned, zero], axis=0)
            share = self.node("GatherND", [weight, self.node("Transpose", [assigned], perm=[1, 0])])
            share = self.node("Unsqueeze", [share, one])
            mine = {n: self.node("Gather", [t, which], axis=0) for n, t in factors.items()}

            def low_rank(y: str, x: str, a: str, b: str, mine: dict[str, str] = mine) -> str:
                if not mine:
                    return y
                t = self.node("Gemm", [x, mine[a]], transB=1)
                return str(self.node("Gemm", [t, mine[b], y], transB=1, alpha=lora.SCALE))

            h_in = self.node("Gather", [swapped if place.format == "int4" else x, rows], axis=0)
            h = self.product(h_in, f"{name}.{up}", blob, up, place.format, out, d)
            if mine:
                h = low_rank(h, self.node("Gather", [x, rows], axis=0), "up_a", "up_b")
            h = self.activation(h, _attribute(node, "activation"), up == "gate_up")
            y = self.product(
                self.swapped(h, f, place.format), f"{name}.{down}", blob, down, place.format, d, f
            )
            y = self.node("Mul", [low_rank(y, h, "down_a", "down_b"), share])
            last = p == len(places) - 1
            total = self.node(
                "ScatterND",
                [total, self.node("Unsqueeze", [rows, one]), y],
                [node.output[0]] if last else 1,
                reduction="add",
            )

    def activation(self, h: str, which: int, gated: bool) -> str:
        """The non-linearity between the projections."""
        name = ops.ACTIVATIONS[which]
        gate, other = self.node("Split", [h], 2, axis=1, num_outputs=2) if gated else (h, "")
        if name == "silu":
            act = self.node("Mul", [gate, self.node("Sigmoid", [gate])])
        elif name == "relu":
            act = self.node("Relu", [gate])
        else:
            act = self.node("Gelu", [gate], approximate="tanh" if name == "gelu_tanh" else "none")
        return str(self.node("Mul", [act, other])) if gated else str(act)


def _attribute(node: NodeProto, name: str) -> Any:
    found: AttributeProto = next(a for a in node.attribute if a.name == name)
    return helper.get_attribute_value(found)


def _translated(program: ExportedProgram) -> ModelProto:
    """torch's own translation, with placeholders."""
    table = {
        getattr(torch.ops.expertfleet, name).default: _placeholder(name) for name in _PLACEHOLDERS
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            custom_translation_table=table,
            verbose=False,
            optimize=True,
        )
    model: ModelProto = made.model_proto
    return model


def _rename(graph: GraphProto, names: Mapping[str, str]) -> None:
    """Give inputs and outputs their own names."""
    for node in graph.node:
        for given in (node.input, node.output):
            for i, name in enumerate(given):
                given[i] = names.get(name, name)
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        value.name = names.get(value.name, value.name)


def to_onnx(model: DecodeModel, resident: Mapping[int, Sequence[int]], blobs: Path) -> ModelProto:
    """The model for these experts; its file belongs into the folder `blobs`.

    Parameters
    ----------
    model : DecodeModel
        Slots of one rank, int4 or int8. Its chunk only has to be larger than 1: the graph takes any number of tokens.
    resident : layer -> global expert ids in slot order

    Raises
    ------
    OnnxError
    """
    translated = _translated(capture(model))
    graph = translated.graph
    inputs = dict(zip([i.name for i in graph.input], [s.name for s in model.specs], strict=True))
    outputs = dict(zip([o.name for o in graph.output], model.output_names(), strict=True))
    _rename(graph, inputs | outputs)
    made = _Graph(model, resident, _Blobs(blobs))
    replace = {
        "packed_linear": made.linear,
        "packed_embedding": made.embedding,
        "routed_experts_norms": made.experts,
    }
    for node in graph.node:
        if node.domain == "expertfleet":
            replace[node.op_type](node)
        else:
            made.nodes.append(node)
    used = {name for node in made.nodes for name in node.input}
    adapter = {spec.name for spec in model.adapter}
    kept = []
    for value in graph.input:
        if value.name.startswith(("dense.", "layers.")) and value.name not in adapter:
            if value.name in used and value.name not in made.initializers:
                _weight(made, value.name)
        else:
            kept.append(value)
    del graph.input[:], graph.node[:], graph.value_info[:]
    graph.input.extend(kept)
    graph.node.extend(made.nodes)
    graph.initializer.extend(made.initializers.values())
    graph.name = "decode"
    for domain, version in ((MICROSOFT, 1),):
        translated.opset_import.append(helper.make_opsetid(domain, version))
    kept_domains = [o for o in translated.opset_import if o.domain in ("", MICROSOFT)]
    del translated.opset_import[:]
    translated.opset_import.extend(kept_domains)
    return translated


def _weight(made: _Graph, name: str) -> None:
    """An initialiser for a weight that is not packed."""
    base = made.base
    blob = base.dense[made.shape.dense]
    if name.startswith("dense."):
        spec = next(s for s in made.model.specs if s.name == name)
        made.external(name, blob, name.removeprefix("dense."), spec.shape)
        return
    _, layer, what = name.split(".", 2)
    rows = made.blobs.array(blob, f"layers.{layer}.{what.replace('router_rows', 'router')}")
    made.constant(name, rows[list(made.resident[int(layer)])].astype(np.float32))
