"""A round by hand: two devices train in the ExecuTorch runtime, the server aggregates, the adapter is loaded."""

import warnings

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, SwitchTransformersForConditionalGeneration

from edge import slots
from edge.adamw import AdamW
from edge.session import load_backend
from export import fft_adapter
from export.families import fft_moe
from protocol import packing, tensors
from protocol.manifest import Shape, Slot
from server import adapters
from server.aggregate import aggregate
from server.contribution import Contribution
from server.fft_adapter import fft_files
from server.peft_adapter import peft_files
from tests.export.families import lowered, test_fft_moe, test_switch, tiny_fft, tiny_switch

RANK = 4


def trained(on_disk, resident, adapter, batch):
    """(adapter after three steps, tokens per (layer, expert)) of one device."""
    base, shape = on_disk.base, on_disk.manifest.shape
    session = load_backend("executorch").open_train(on_disk, resident)
    held = {
        name: adapter[name][tuple(slice(size) for size in sizes)]
        for name, sizes in slots.adapter_shapes(base, shape, resident).items()
    }
    session.load(held)
    values, tokens, losses = session.parameters(), {}, []
    optimizer = AdamW({name: 0.05 if ".router." in name else 0.03 for name in values})
    for _ in range(3):
        loss, routed = session.forward_backward(batch)
        optimizer.step(values, session.gradients())
        losses.append(loss)
        for layer, counts in routed.items():
            for expert, count in zip(resident[layer], counts, strict=True):
                tokens[layer, expert] = tokens.get((layer, expert), 0.0) + float(count)
    assert losses[-1] < losses[0]
    found = {name: values[name].copy() for name in held}  # output scales stay on the device
    session.close()
    return found, tokens


def one_round(base, family, store, shape, held, batch):
    """The global adapter after a round of two devices."""
    on_disk = lowered.artifact(base, family, store, shape)
    before = adapters.fresh(base, RANK)
    contributions = [
        Contribution(device=name, tensors=found, trained_tokens=weights)
        for name, resident in held.items()
        for found, weights in [trained(on_disk, resident, before, batch)]
    ]
    after = aggregate(before, contributions, base.projections).adapter
    assert any((after[name] != before[name]).any() for name in after)
    return after


def everyone(base, shape, slot):
    """(a shape with room for all experts, who sits where)."""
    layers, experts = len(base.moe_layers), base.num_experts
    whole = Shape(
        batch=shape.batch,
        sequence=shape.sequence,
        answers=shape.answers,
        dense="int8",
        slots=((slot,) * experts,) * layers,
    )
    return whole, {layer: tuple(range(experts)) for layer in base.moe_layers}


def round_dense(model):
    """Weights as the blobs hold them, all in eight bits, but for routers."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if packing.packs(tuple(parameter.shape)) and "router" not in name:
                parameter.copy_(lowered.rounded(parameter, "int8"))
    return model.eval()


def write(folder, files):
    for name, data in files.items():
        (folder / name).write_bytes(data)


def routers_of(base, store):
    dense = tensors.decode(store.get(base.dense["int8"]))
    return {layer: dense[f"layers.{layer}.router"] for layer in base.moe_layers}


def test_adapter_experts_go_round(tmp_path):
    folder = tiny_fft.write_dense(tmp_path / "dense", "qwen3")
    base, family, store = lowered.sliced(
        folder, tmp_path / "store", ("int8",), {fft_moe.EXPERTS: 4, fft_moe.TOP_K: 2}
    )
    slot, batch = Slot(format="none", rank=RANK), test_fft_moe.BATCH
    shape = Shape(batch=2, sequence=12, answers=2, dense="int8", slots=((slot,) * 3, (slot,) * 2))
    held = {"one": {0: (2, 0, 3), 1: (3, 1)}, "two": {0: (1, 2, 0), 1: (0, 1)}}
    after = one_round(base, family, store, shape, held, batch)

    out = tmp_path / "adapter"
    out.mkdir()
    write(out, fft_files(after, routers_of(base, store), base, version=1, base_name="tiny"))
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    model = fft_adapter.load(round_dense(model), out)
    with torch.no_grad():
        logits = model(torch.from_numpy(batch.tokens)).logits.flatten(0, 1).numpy()
    whole, resident = everyone(base, shape, slot)
    ours = lowered.eager(base, family, store, whole, resident, batch, after, evaluate=True)
    np.testing.assert_allclose(ours["logits"], logits[batch.positions], atol=1e-4)


def test_switch_goes_round(tmp_path):
    folder = tiny_switch.write_switch(tmp_path / "switch")
    base, family, store = lowered.sliced(folder, tmp_path / "store", ("int8",))
    slot, batch = Slot(format="int8", rank=RANK), test_switch.BATCH
    kinds = (slot, slot, Slot(format="int8", rank=2))
    shape = Shape(batch=2, sequence=12, answers=3, dense="int8", slots=(kinds, kinds))
    held = {"one": {1: (2, 0, 3), 3: (3, 1, 0)}, "two": {1: (1, 2, 0), 3: (0, 1, 2)}}
    after = one_round(base, family, store, shape, held, batch)

    out = tmp_path / "adapter"
    out.mkdir()
    write(out, peft_files(after, routers_of(base, store), base, version=1, base_name="tiny"))
    model = round_dense(SwitchTransformersForConditionalGeneration.from_pretrained(folder))
    with warnings.catch_warnings():
        # peft 0.21.2 asks transformers 5.23 for a property by its former name.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        model = PeftModel.from_pretrained(model, out).eval()
    with torch.no_grad():
        logits = model(
            input_ids=torch.from_numpy(batch.tokens),
            attention_mask=torch.from_numpy(batch.valid),
            labels=torch.from_numpy(batch.targets),
        ).logits.numpy()
    whole, resident = everyone(base, shape, slot)
    ours = lowered.eager(base, family, store, whole, resident, batch, after, evaluate=True)
    np.testing.assert_allclose(ours["logits"], logits, atol=1e-4)
    plain = lowered.eager(
        base, family, store, whole, resident, batch, adapters.fresh(base, RANK), evaluate=True
    )
    assert np.abs(plain["logits"] - ours["logits"]).max() > 0.01
