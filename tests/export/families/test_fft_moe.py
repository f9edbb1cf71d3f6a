"""FFT-MoE bases: a frozen dense model with adapter experts, in our graph, in ExecuTorch, and by the formula."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from edge.session import Batch, load_backend
from export import families
from export.families import FamilyError, fft_moe
from protocol import names, packing
from protocol.manifest import Shape, Slot
from tests.export.families import lowered, tiny_fft

E, K = tiny_fft.EXPERTS, tiny_fft.TOP_K
SLOTS = (Slot(format="none", rank=8), Slot(format="none", rank=8), Slot(format="none", rank=5))
SHAPE = Shape(batch=2, sequence=12, answers=2, dense="int8", slots=(SLOTS, SLOTS[1:]))
RESIDENT = {0: (2, 0, 3), 1: (3, 1)}
BATCH = Batch(
    tokens=np.random.default_rng(1).integers(2, 300, (2, 12)),
    valid=np.array([[1] * 12, [1] * 8 + [0] * 4], np.float32),
    positions=np.array([[3, 10], [12 + 2, 12 + 6]]),
    targets=np.array([[7, 250], [31, 4]]),
    weights=np.array([[1, 1], [1, 0.5]], np.float32),
    labels=np.full(2, -1),
)
ASKED = {fft_moe.EXPERTS: E, fft_moe.TOP_K: K}


@pytest.fixture(scope="module", params=fft_moe.DENSE)
def made(request, tmp_path_factory):
    """(folder of the dense checkpoint, base, family, store)."""
    folder = tiny_fft.write_dense(tmp_path_factory.mktemp(request.param), request.param)
    return folder, *lowered.sliced(folder, tmp_path_factory.mktemp("store"), ("int8",), ASKED)


def adapter_of(resident, slots, seed=0):
    """What the residents train: the first rows of A and columns of B where the slot is narrower."""
    whole = tiny_fft.random_adapter(seed)
    adapter = {}
    for (layer, ids), kinds in zip(resident.items(), slots, strict=True):
        for expert, slot in zip(ids, kinds, strict=True):
            a = names.lora(layer, expert, "adapter", "lora_A")
            b = names.lora(layer, expert, "adapter", "lora_B")
            adapter[a] = whole[a][: slot.rank].copy()
            adapter[b] = whole[b][:, : slot.rank].copy()
            row = names.router_row(layer, expert)
            adapter[row] = whole[row]
    return adapter


def reference(folder, base, resident, adapter, batch):
    """(logits [B, K, V], loss, gradients) of the dense transformers model with the formula in a hook."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if packing.packs(tuple(parameter.shape)):
            parameter.copy_(lowered.rounded(parameter, "int8"))
    leaves = {n: torch.from_numpy(v).requires_grad_(True) for n, v in adapter.items()}
    leaves |= {names.output_scale(n): torch.ones(1, requires_grad=True) for n in resident}
    for layer, ids in resident.items():
        w = torch.from_numpy(fft_moe.fresh_router(layer, base.config))
        rows = torch.stack([w[e] + leaves[names.router_row(layer, e)] for e in ids])
        experts = [
            tuple(leaves[names.lora(layer, e, "adapter", factor)] for factor in names.FACTORS)
            for e in ids
        ]

        scale = leaves[names.output_scale(layer)]

        def add(module, args, output, rows=rows, experts=experts, scale=scale):
            x = args[0]
            p, best = torch.softmax(x @ rows.T, -1).topk(K, -1)
            p = p / p.sum(-1, keepdim=True)
            for slot, (v, u) in enumerate(experts):
                share = (p * (best == slot)).sum(-1, keepdim=True)
                output = output + scale * share * (F.silu(x @ v.T) @ u.T)
            return output

        model.model.layers[layer].mlp.register_forward_hook(add)
    logits = model(torch.from_numpy(batch.tokens)).logits.flatten(0, 1)[
        torch.from_numpy(batch.positions).reshape(-1)
    ]
    share = torch.from_numpy(batch.weights).reshape(-1)
    targets = torch.from_numpy(batch.targets).reshape(-1)
    loss = (F.cross_entropy(logits, targets, reduction="none") * share).sum() / share.sum()
    found = torch.autograd.grad(loss, list(leaves.values())) if leaves else ()
    gradients = {name: g.numpy() for name, g in zip(leaves, found, strict=True)}
    shape = (*batch.positions.shape, -1)
    return logits.detach().numpy().reshape(shape), float(loss.detach()), gradients


def test_the_base_has_a_router_of_its_own_and_no_expert_blobs(made):
    _, base, family, store = made
    assert base.projections == ("adapter",)
    assert base.experts == base.error == {}
    assert base.peft is None
    assert (base.num_experts, base.top_k, base.moe_layers) == (E, K, (0, 1))
    from protocol import tensors

    dense = tensors.decode(store.get(base.dense["int8"]))
    assert dense["layers.1.router"].shape == (E, 64)
    assert not np.array_equal(dense["layers.0.router"], dense["layers.1.router"])
    np.testing.assert_array_equal(dense["layers.1.router"], family.fresh_router(1, base.config))


def test_with_zero_u_it_is_the_frozen_model(made):
    folder, base, family, store = made
    adapter = adapter_of(RESIDENT, SHAPE.slots)
    for name in adapter:
        if name.endswith("lora_B"):
            adapter[name] = np.zeros_like(adapter[name])
    found = lowered.eager(base, family, store, SHAPE, RESIDENT, BATCH, adapter, evaluate=True)
    wanted, _, _ = reference(folder, base, {}, {}, BATCH)
    np.testing.assert_allclose(found["logits"], wanted, atol=1e-5)


def test_the_graph_is_the_formula_over_the_residents(made):
    folder, base, family, store = made
    adapter = adapter_of(RESIDENT, SHAPE.slots)
    logits, loss, gradients = reference(folder, base, RESIDENT, adapter, BATCH)
    arguments = (base, family, store, SHAPE, RESIDENT, BATCH, adapter)
    found = lowered.eager(*arguments, evaluate=True)
    np.testing.assert_allclose(found["logits"], logits, atol=1e-4)
    trained = lowered.eager(*arguments, evaluate=False)
    assert trained["loss"] == pytest.approx(loss, abs=1e-5)
    assert trained["layers.0.routed"].sum() == K * 20
    lowered.check_gradients(trained["gradients"], gradients)


def test_executorch_is_the_formula(made):
    folder, base, family, store = made
    adapter = adapter_of(RESIDENT, SHAPE.slots, seed=3)
    logits, loss, gradients = reference(folder, base, RESIDENT, adapter, BATCH)
    on_disk = lowered.artifact(base, family, store, SHAPE)
    backend = load_backend("executorch")
    session = backend.open_train(on_disk, RESIDENT)
    session.load(adapter)
    found, _ = session.forward_backward(BATCH)
    assert found == pytest.approx(loss, abs=1e-4)
    lowered.check_gradients(session.gradients(), gradients)
    session.close()
    reader = backend.open_evaluate(on_disk, RESIDENT)
    answered, stats = reader.evaluate(BATCH, adapter)
    reader.close()
    np.testing.assert_allclose(answered, logits, atol=1e-3)
    assert stats[0].mass.sum() == pytest.approx(20, rel=1e-4)
    assert (stats[0].output_norm > 0).all()


def test_a_dense_model_says_how_and_a_moe_says_no(made):
    folder, *_ = made
    config = json.loads((folder / "config.json").read_bytes())
    with pytest.raises(FamilyError, match="^here: .*--adapter-experts M trains M small ones"):
        families.of(config, "here")
    with pytest.raises(FamilyError, match="beside a dense model .*'olmoe' found"):
        fft_moe.with_experts({"model_type": "olmoe"}, 4, 2, "here")
    with pytest.raises(FamilyError, match="3 of 2 adapter experts"):
        fft_moe.with_experts(config, 2, 3, "here")
