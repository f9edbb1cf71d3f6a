"""A tiny base as an artifact on disk, with its programs, and our graph run in eager torch beside it."""

from __future__ import annotations

import numpy as np
import torch

from edge import slots
from edge.session import PLAIN, Artifact
from edge.session_executorch import objective_inputs
from export import families
from export.blob_store import BlobStore
from export.checkpoint import Checkpoint
from export.programs import Programs, lower_programs
from export.slice_base import slice_base
from export.train_graph import SubModel
from protocol import PROTOCOL_VERSION, names, packing, tensors
from protocol.manifest import Manifest, MemoryPlan
from tests.export.families.setting import NO_PROGRAM


def sliced(folder, out, formats=("int4", "int8"), more=None):
    """(base, family, store); `more` is added to the checkpoint's configuration."""
    checkpoint = Checkpoint(folder)
    checkpoint.config |= more or {}
    family, store = families.of(checkpoint.config, str(folder)), BlobStore(out)
    return slice_base(checkpoint, family, store, lambda stage: None, formats), family, store


def artifact(base, family, store, shape, *, programs=True):
    """With both programs lowered, or without for the torch backend."""
    made = Programs(train=NO_PROGRAM, evaluate=NO_PROGRAM)
    if programs:
        made = lower_programs(base, family, shape, store, lambda stage: None)
    manifest = Manifest(
        protocol=PROTOCOL_VERSION,
        base=base.base,
        profile="tiny",
        shape=shape,
        train=made.train,
        evaluate=made.evaluate,
        dense=base.dense[shape.dense],
        tokenizer=base.tokenizer,
        memory=MemoryPlan(
            budget=1, arena=0, inputs=0, parameters=0, optimizer=0, outputs=0, runtime=0
        ),
        experts={},
    )
    return Artifact(base, manifest, store.folder)


def eager(base, family, store, shape, resident, batch, adapter, *, evaluate, terms=PLAIN):
    """Output name -> array of `SubModel` without any lowering."""
    model = SubModel(base, family, shape, evaluate)
    read = lambda blob: tensors.decode(store.get(blob))  # noqa: E731
    dense = read(base.dense[shape.dense])
    given = {f"dense.{name}": value for name, value in dense.items()}
    given |= slots.router_inputs(dense, resident)
    given |= slots.resident_inputs(base.num_experts, resident)
    given |= slots.expert_inputs(base, shape, resident, read)
    given |= batch.inputs()
    flat = slots.fresh(model.adapter)
    for name, view in slots.views(flat, base, shape, resident).items():
        view[...] = adapter.get(name, 1.0)
    given |= objective_inputs(terms, resident, base.vocabulary)
    given |= flat
    for layer, ids in resident.items():
        rows = given[f"layers.{layer}.router_all"]
        delta = flat[f"layers.{layer}.router"]
        given[f"layers.{layer}.router_all"] = slots.with_deltas(rows, delta, ids)
    given = slots.check_inputs(given, model.specs, "eager")
    outputs = model(*(torch.from_numpy(np.ascontiguousarray(v)) for v in given.values()))
    named = dict(zip(model.output_names(), (o.numpy() for o in outputs), strict=True))
    gradients = {n.removeprefix("grad."): v for n, v in named.items() if n.startswith("grad.")}
    named["gradients"] = {} if evaluate else slots.views(gradients, base, shape, resident)
    return named


def rounded(weight, format):
    """A matrix as its blob gives it back."""
    packed = packing.quantize(weight.detach().numpy(), format)
    return torch.from_numpy(packing.dequantize(*packed, format))


def check_gradients(found, wanted):
    """Those of an adapter are held to the largest of an adapter, an output scale's, which sums over all, to its own."""
    assert set(found) == set(wanted)
    scales = {name for name in wanted if names.parse(name) is None}
    largest = max(np.abs(g).max() for name, g in wanted.items() if name not in scales)
    for name, gradient in wanted.items():
        size = np.abs(gradient).max() if name in scales else largest
        np.testing.assert_allclose(found[name], gradient, atol=2e-4 * size, err_msg=name)
    assert all(wanted[name].any() for name in scales)
    assert sum(g.any() for g in wanted.values()) > len(wanted) // 2
