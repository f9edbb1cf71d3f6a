"""A family's tiny base three ways: transformers, our graph, the runtime. For tests and `benchmarks/families.py`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edge.session import PLAIN, Artifact, Terms, load_backend
from export import families
from export.families.family import Family
from export.train_graph import SubModel
from protocol import lora, names
from protocol.manifest import BaseIndex, Slot
from tests.export.families import reference, setting, tiny

Arrays = dict[str, NDArray[Any]]


@torch.no_grad()
def add_adapter(model: torch.nn.Module, family: Family, adapter: Arrays) -> None:
    """Add LoRA and router changes to transformers' own weights."""
    parameters = dict(model.named_parameters())
    for name, value in adapter.items():
        key = names.parse(name)
        if key.projection is None:
            parameters[family.router.format(layer=key.layer)][key.expert] += torch.from_numpy(value)
        elif key.factor == "lora_A":
            change = lora.delta(value, adapter[name.replace("lora_A", "lora_B")])
            fused = family.fused[key.projection].format(layer=key.layer)
            parameters[fused][key.expert] += torch.from_numpy(change)


def transformers_logits(
    base: BaseIndex, resident: reference.Resident, slots: tuple[Slot, ...], adapter: Arrays
) -> NDArray[np.float32]:
    """What transformers answers at the batch's positions, absent experts masked, [B, K, V]."""
    family, batch = families.of(base.config, "here"), setting.batch(base.vocabulary)
    model = tiny.random_model(base.model_type)
    formats = {
        (layer, expert): slot.format
        for layer, ids in resident.items()
        for expert, slot in zip(ids, slots, strict=True)
    }
    reference.round_weights(model, family, base.moe_layers, "int8", formats)
    add_adapter(model, family, adapter)
    with torch.no_grad(), reference.masked(model, family, resident):
        logits = model(torch.from_numpy(batch.tokens)).logits
    return logits.reshape(-1, logits.shape[-1]).numpy()[batch.positions]


def graph_logits(
    artifact: Artifact, resident: reference.Resident, adapter: Arrays
) -> NDArray[np.float32]:
    """The same from the graph that is exported, run by torch."""
    base = artifact.base
    family = families.of(base.config, "here")
    model = SubModel(base, family, artifact.manifest.shape, evaluate=True)
    batch = setting.batch(base.vocabulary)
    inputs = setting.graph_inputs(model.specs, artifact, resident, adapter, batch)
    with torch.no_grad():
        return model(*inputs)[0].numpy()


def gradients(
    backend: str,
    artifact: Artifact,
    resident: reference.Resident,
    adapter: Arrays,
    terms: Terms = PLAIN,
) -> tuple[float, Arrays, dict[int, NDArray[np.float32]]]:
    """Loss, gradients by global name, and routed tokens of one step."""
    session = load_backend(backend).open_train(artifact, resident)
    session.load(adapter)
    loss, routed = session.forward_backward(setting.batch(artifact.base.vocabulary), terms)
    found = {name: value.copy() for name, value in session.gradients().items()}
    session.close()
    return loss, found, routed


def largest(one: Arrays, other: Arrays) -> float:
    """The largest difference of a number in the two."""
    assert one.keys() == other.keys()
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)
