"""Switch Transformers against transformers itself: encoder and decoder, one expert a token, absent experts masked."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call
from transformers import SwitchTransformersForConditionalGeneration

from edge.session import Batch, load_backend
from export import costs, families
from export.families import FamilyError, switch
from protocol import lora, names, packing
from protocol.manifest import Shape, Slot
from tests.export.families import lowered, tiny_switch

SLOTS = (
    Slot(format="int8", rank=4),
    Slot(format="int4", rank=4),
    Slot(format="int4", rank=2),
    Slot(format="int8", rank=0),
)
SHAPE = Shape(batch=2, sequence=12, answers=3, dense="int8", slots=(SLOTS[:3], SLOTS))
RESIDENT = {1: (2, 0, 3), 3: (3, 1, 0, 2)}
BATCH = Batch(
    tokens=np.random.default_rng(1).integers(2, 300, (2, 12)),
    valid=np.array([[1] * 12, [1] * 7 + [0] * 5], np.float32),
    positions=np.zeros((2, 3), np.int64),
    targets=np.array([[7, 250, 1], [31, 1, 0]]),
    weights=np.array([[1, 1, 1], [1, 1, 0]], np.float32),
    labels=np.full(2, -1),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_switch.write_switch(tmp_path_factory.mktemp("switch"))


@pytest.fixture(scope="module")
def made(checkpoint, tmp_path_factory):
    return lowered.sliced(checkpoint, tmp_path_factory.mktemp("store"))


def adapter_of(base, seed=0, spread=0.15):
    rng = np.random.default_rng(seed)
    adapter = {}
    for (layer, ids), kinds in zip(RESIDENT.items(), SHAPE.slots, strict=True):
        for expert, slot in zip(ids, kinds, strict=True):
            for projection in base.projections if slot.rank else ():
                out, features = base.features(projection)
                for factor, size in (
                    ("lora_A", (slot.rank, features)),
                    ("lora_B", (out, slot.rank)),
                ):
                    key = names.lora(layer, expert, projection, factor)
                    adapter[key] = rng.normal(0, spread, size).astype(np.float32)
            row = rng.normal(0, spread, base.hidden).astype(np.float32)
            adapter[names.router_row(layer, expert)] = row
    return adapter


def reference(checkpoint, resident, shape, adapter, batch):
    """(logits [B, K, V], loss, gradients by global name) of transformers over the rounded weights."""
    model = SwitchTransformersForConditionalGeneration.from_pretrained(
        checkpoint, attn_implementation="eager"
    ).eval()
    leaves = {n: torch.from_numpy(v).requires_grad_(True) for n, v in adapter.items()}
    leaves |= {names.output_scale(n): torch.ones(1, requires_grad=True) for n in resident}
    places = switch.places(json.loads((checkpoint / "config.json").read_bytes()))
    weights = {
        name: lowered.rounded(p, "int8") if packing.packs(tuple(p.shape)) else p.detach()
        for name, p in model.named_parameters()
    }
    for (layer, ids), kinds in zip(resident.items(), shape.slots, strict=True):
        at = f"{places[layer]}.mlp"
        router = dict(model.named_parameters())[f"{at}.router.classifier.weight"].detach()
        rows = list(router)
        for expert, slot in zip(ids, kinds, strict=True):
            rows[expert] = rows[expert] + leaves[names.router_row(layer, expert)]
            for projection, module in (("up", "wi"), ("down", "wo")):
                name = f"{at}.experts.expert_{expert}.{module}.weight"
                weights[name] = lowered.rounded(model.get_parameter(name), slot.format)
                if slot.rank:
                    a = leaves[names.lora(layer, expert, projection, "lora_A")]
                    b = leaves[names.lora(layer, expert, projection, "lora_B")]
                    weights[name] = weights[name] + lora.SCALE * b @ a
        del weights[f"{at}.router.classifier.weight"]
        rows, absent = torch.stack(rows), torch.ones(tiny_switch.EXPERTS, dtype=torch.bool)
        absent[list(ids)] = False
        scale = leaves[names.output_scale(layer)]
        model.get_submodule(f"{at}.experts").register_forward_hook(
            lambda module, args, out, scale=scale: out * scale
        )
        model.get_submodule(f"{at}.router.classifier").register_forward_hook(
            lambda module, args, out, rows=rows, absent=absent: (args[0] @ rows.T).masked_fill(
                absent, float("-inf")
            )
        )
    targets = torch.from_numpy(batch.targets)
    logits = functional_call(
        model,
        weights,
        (),
        {
            "input_ids": torch.from_numpy(batch.tokens),
            "attention_mask": torch.from_numpy(batch.valid),
            "labels": targets,  # shifted right by transformers itself
        },
    ).logits
    share = torch.from_numpy(batch.weights).reshape(-1)
    nll = F.cross_entropy(logits.flatten(0, 1), targets.reshape(-1), reduction="none")
    loss = (nll * share).sum() / share.sum()
    gradients = {}
    if leaves:
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        gradients = {
            name: np.zeros_like(leaf.detach().numpy()) if g is None else g.numpy()
            for (name, leaf), g in zip(leaves.items(), found, strict=True)
        }
    return logits.detach().numpy(), float(loss.detach()), gradients


def test_layers_are_numbered_through_both_stacks(made):
    base, family, _ = made
    assert base.moe_layers == (1, 3)
    assert base.architecture == "seq2seq"
    assert base.projections == ("up", "down")
    assert family.block.format(layer=3) == "decoder.block.1.layer.2.mlp"
    name = family.split["down"][0].format(layer=1, expert=2)
    assert name == "encoder.block.1.layer.1.mlp.experts.expert_2.wo.weight"
    real = {"num_layers": 12, "num_sparse_encoder_layers": 6, "num_sparse_decoder_layers": 6}
    assert list(switch.places(real)) == [1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23]


def test_position_biases_by_distance_are_those_of_transformers(checkpoint):
    model = SwitchTransformersForConditionalGeneration.from_pretrained(checkpoint)
    attentions = [stack.block[0].layer[0].SelfAttention for stack in (model.encoder, model.decoder)]
    wanted = [attention.compute_bias(200, 180) for attention in attentions]
    assert not torch.equal(*wanted)
    switch.adapt(model)
    for attention, bias in zip(attentions, wanted, strict=True):
        torch.testing.assert_close(attention.compute_bias(200, 180), bias, atol=0, rtol=0)


def test_all_resident_in_eight_bits_is_transformers_itself(made, checkpoint):
    base, family, store = made
    kinds = (Slot(format="int8", rank=1),) * 4
    shape = Shape(batch=2, sequence=12, answers=3, dense="int8", slots=(kinds, kinds))
    resident = {1: (0, 1, 2, 3), 3: (0, 1, 2, 3)}
    zero = {}
    for layer in resident:
        for e in range(4):
            zero[names.router_row(layer, e)] = np.zeros(64, np.float32)
            for projection in base.projections:
                out, features = base.features(projection)
                zero[names.lora(layer, e, projection, "lora_A")] = np.ones(
                    (1, features), np.float32
                )
                zero[names.lora(layer, e, projection, "lora_B")] = np.zeros((out, 1), np.float32)
    found = lowered.eager(base, family, store, shape, resident, BATCH, zero, evaluate=True)
    wanted, _, _ = reference(checkpoint, resident, shape, zero, BATCH)
    np.testing.assert_allclose(found["logits"], wanted, atol=1e-4)
    assert abs(found["layers.1.missed"]).max() < 1e-4
    assert found["layers.1.mass"].sum() == pytest.approx(19, rel=1e-5)  # tokens of both prompts
    assert found["layers.3.mass"].sum() == pytest.approx(5, rel=1e-5)  # scored answer tokens
    # Rounded to eight bits, the model is still the checkpoint.
    exact = SwitchTransformersForConditionalGeneration.from_pretrained(checkpoint).eval()
    with torch.no_grad():
        logits = exact(
            input_ids=torch.from_numpy(BATCH.tokens),
            attention_mask=torch.from_numpy(BATCH.valid),
            labels=torch.from_numpy(BATCH.targets),
        ).logits.numpy()
    # A token whose two best experts are close may change its expert: most logits are near, not all.
    assert np.median(np.abs(found["logits"] - logits)) < 0.05 * np.abs(logits).max()


def test_a_slice_is_transformers_with_absent_experts_masked(made, checkpoint):
    base, family, store = made
    adapter = adapter_of(base)
    logits, loss, gradients = reference(checkpoint, RESIDENT, SHAPE, adapter, BATCH)
    arguments = (base, family, store, SHAPE, RESIDENT, BATCH, adapter)
    found = lowered.eager(*arguments, evaluate=True)
    np.testing.assert_allclose(found["logits"], logits, atol=1e-4)
    assert found["layers.1.missed"].sum() > 0.1
    trained = lowered.eager(*arguments, evaluate=False)
    assert trained["loss"] == pytest.approx(loss, abs=1e-5)
    assert trained["layers.1.routed"].sum() == 19
    assert trained["layers.3.routed"].sum() == 5
    lowered.check_gradients(trained["gradients"], gradients)


def test_executorch_is_transformers(made, checkpoint):
    base, family, store = made
    adapter = adapter_of(base, seed=3)
    logits, loss, gradients = reference(checkpoint, RESIDENT, SHAPE, adapter, BATCH)
    on_disk = lowered.artifact(base, family, store, SHAPE)
    # The planner's estimate counts the decoder's few tokens apart from the encoder's.
    arena = on_disk.manifest.train.arena_bytes
    assert 0.9 < costs.arena_bytes(base, costs.dense_of(base), SHAPE) / arena < 1.3
    backend = load_backend("executorch")
    session = backend.open_train(on_disk, RESIDENT)
    session.load(adapter)
    found, routed = session.forward_backward(BATCH)
    assert found == pytest.approx(loss, abs=1e-4)
    assert routed[3].sum() == 5
    lowered.check_gradients(session.gradients(), gradients)
    session.close()
    reader = backend.open_evaluate(on_disk, RESIDENT)
    answered, stats = reader.evaluate(BATCH, adapter)
    reader.close()
    np.testing.assert_allclose(answered, logits, atol=1e-3)
    assert stats[1].mass.sum() == pytest.approx(19, rel=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"router_bias": True}, "routers with a bias"),
        ({"tie_word_embeddings": False}, "head of their own"),
        ({"dense_act_fn": "gated-gelu"}, "'gated-gelu' found, one of relu"),
    ],
)
def test_variants_that_nobody_published_are_refused(checkpoint, change, said):
    config = json.loads((checkpoint / "config.json").read_bytes()) | change
    with pytest.raises(FamilyError, match=f"^here: .*{said}"):
        families.of(config, "here")
