"""The graphs of a tiny OLMoE, eager and compiled, against transformers with the absent experts cut out."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call
from transformers import OlmoeForCausalLM

from edge import native, slots
from export import families, local_objective
from export.to_executorch import lower
from export.train_graph import STATISTICS, SubModel, adapter_specs, capture
from protocol import lora, names, packing, tensors
from protocol.manifest import Slot
from tests.export.families import setting, tiny

KINDS = tuple(
    Slot(format=f, rank=r) for f, r in (("int8", 4), ("int4", 4), ("int4", 2), ("int8", 0))
)
RESIDENT = {0: (5, 0, 3, 2), 1: (1, 4, 0, 3)}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return setting.artifact(*setting.sliced("olmoe", tmp_path_factory.mktemp("olmoe")), KINDS)


@pytest.fixture(scope="module")
def batch(artifact):
    return setting.batch(artifact.base.vocabulary)


@pytest.fixture(scope="module")
def adapter(artifact):
    shapes = slots.adapter_shapes(artifact.base, artifact.manifest.shape, RESIDENT)
    rng = np.random.default_rng(0)
    return {n: rng.normal(0, 0.1, size).astype(np.float32) for n, size in shapes.items()}


def model_of(artifact, *, evaluate):
    family = families.of(artifact.base.config, "here")
    return SubModel(artifact.base, family, artifact.manifest.shape, evaluate)


def arguments(artifact, model, adapter, batch):
    return setting.graph_inputs(model.specs, artifact, RESIDENT, adapter, batch)


@pytest.fixture(scope="module", params=[False, True], ids=["train", "evaluate"])
def graph(request, artifact, adapter, batch, tmp_path_factory):
    """(model, captured program, the compiled one's outputs, eager's outputs)."""
    model = model_of(artifact, evaluate=request.param)
    given = arguments(artifact, model, adapter, batch)
    captured = capture(model)
    path = tmp_path_factory.mktemp("program") / "graph.pte"
    lowered = lower(captured)
    path.write_bytes(lowered.program)
    opened = native.Program(path)
    assert opened.arena_bytes("forward") == lowered.arena_bytes > 0
    found = [v.copy() for v in opened.run("forward", [g.numpy() for g in given])]
    opened.close()
    return model, captured, found, [v.detach().numpy() for v in model(*given)]


def test_the_compiled_program_gives_what_eager_gives(graph):
    model, _, found, wanted = graph
    for name, one, other in zip(model.output_names(), found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5, rtol=1e-4, err_msg=name)


class Cut:
    """transformers' OLMoE with dequantised weights, only the resident experts and router rows, and float LoRA."""

    def __init__(self, artifact, adapter):
        base = artifact.base
        self.adapter = {
            name: torch.from_numpy(value.copy()).requires_grad_(True)
            for name, value in adapter.items()
        }
        read = lambda blob: tensors.decode(artifact.path(blob).read_bytes())  # noqa: E731
        dense = read(artifact.manifest.dense)
        config = tiny.config("olmoe")
        self.model = OlmoeForCausalLM._from_config(
            config, attn_implementation="eager", experts_implementation="eager"
        ).eval()
        self.weights = {}
        for name in dict(self.model.named_parameters()):
            if f"{name}.packed" in dense:
                parts = dense[f"{name}.packed"], dense[f"{name}.scale"]
                self.weights[name] = torch.from_numpy(packing.dequantize(*parts, "int8"))
            elif name in dense:
                self.weights[name] = torch.from_numpy(dense[name])
        self.routers = {}
        for position, (layer, ids) in enumerate(RESIDENT.items()):
            block, prefix = self.model.model.layers[layer].mlp, f"model.layers.{layer}.mlp"
            block.experts.num_experts = block.gate.num_experts = len(ids)
            router = torch.from_numpy(dense[f"layers.{layer}.router"])
            rows = torch.stack([self.adapter[f"layers.{layer}.router.{e}"] for e in ids])
            self.weights[f"{prefix}.gate.weight"] = router[list(ids)] + rows
            self.routers[layer] = router.index_add(0, torch.tensor(ids), rows)
            for projection in base.projections:
                stacked = []
                for e, kind in zip(ids, KINDS, strict=True):
                    blob = read(base.experts[kind.format][position][e])
                    parts = blob[f"{projection}.packed"], blob[f"{projection}.scale"]
                    weight = torch.from_numpy(packing.dequantize(*parts, kind.format))
                    if kind.rank:
                        a, b = (
                            self.adapter[f"layers.{layer}.experts.{e}.{projection}.{factor}"]
                            for factor in ("lora_A", "lora_B")
                        )
                        weight = weight + lora.SCALE * b @ a
                    stacked.append(weight)
                self.weights[f"{prefix}.experts.{projection}_proj"] = torch.stack(stacked)

    def logits(self, batch):
        """[B * K, V]; what went into each block is kept in `hidden`."""
        self.hidden, hooks = {}, []
        for layer in RESIDENT:

            def keep(module, inputs, layer=layer):
                self.hidden[layer] = inputs[0].detach().reshape(-1, inputs[0].shape[-1])

            block = self.model.model.layers[layer].mlp
            hooks.append(block.register_forward_pre_hook(keep))
        inputs = {"input_ids": torch.from_numpy(batch.tokens), "use_cache": False}
        logits = functional_call(self.model, self.weights, (), inputs).logits
        for hook in hooks:
            hook.remove()
        return logits.reshape(-1, logits.shape[-1])[torch.from_numpy(batch.positions).reshape(-1)]


def test_loss_and_gradients_are_those_of_autograd(artifact, adapter, batch):
    model = model_of(artifact, evaluate=False)
    outputs = model(*arguments(artifact, model, adapter, batch))
    found = dict(zip(model.output_names(), (v.numpy() for v in outputs), strict=True))
    cut = Cut(artifact, adapter)
    nll = F.cross_entropy(
        cut.logits(batch), torch.from_numpy(batch.targets).reshape(-1), reduction="none"
    )
    weights = torch.from_numpy(batch.weights).reshape(-1)
    loss = (nll * weights).sum() / weights.sum()
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)
    wanted = torch.autograd.grad(loss, list(cut.adapter.values()))
    flat = {n.removeprefix("grad."): v for n, v in found.items() if n.startswith("grad.")}
    gradients = slots.views(flat, artifact.base, artifact.manifest.shape, RESIDENT)
    assert gradients.keys() == adapter.keys() | {names.output_scale(layer) for layer in RESIDENT}
    for name, value in zip(cut.adapter, wanted, strict=True):
        np.testing.assert_allclose(
            gradients[name], value.numpy(), atol=1e-5, rtol=1e-3, err_msg=name
        )
    assert max(float(g.abs().max()) for g in wanted) > 0.01
    for layer in RESIDENT:
        assert found[f"layers.{layer}.routed"].sum() == 2 * batch.valid.sum()


def test_logits_and_statistics_are_those_of_transformers(artifact, adapter, batch):
    model = model_of(artifact, evaluate=True)
    with torch.no_grad():
        outputs = model(*arguments(artifact, model, adapter, batch))
        cut = Cut(artifact, adapter)
        logits = cut.logits(batch)
    found = dict(zip(model.output_names(), (v.numpy() for v in outputs), strict=True))
    np.testing.assert_allclose(found["logits"].reshape(logits.shape), logits, atol=1e-4)
    valid = torch.from_numpy(batch.valid).reshape(-1, 1)
    for layer, ids in RESIDENT.items():
        g = torch.softmax(cut.hidden[layer] @ cut.routers[layer].detach().T, -1)
        chosen = torch.zeros_like(g).scatter(1, g.topk(2).indices, 1.0)
        missed = 1 - g[:, list(ids)].sum(-1, keepdim=True)
        for name, value in (
            ("mass", g), ("top", g * chosen), ("g_log_g", g * g.log()), ("missed", missed),
        ):  # fmt: skip
            wanted = (value * valid).sum(0).numpy()
            np.testing.assert_allclose(
                found[f"layers.{layer}.{name}"], wanted, atol=1e-3, rtol=1e-4, err_msg=name
            )
        assert (found[f"layers.{layer}.output_norm"] > 0).all()


def test_inputs_and_outputs_are_as_the_manifest_says(artifact):
    train, evaluate = (model_of(artifact, evaluate=e) for e in (False, True))
    base, shape = artifact.base, artifact.manifest.shape
    assert train.names[:5] == ["tokens", "valid", "positions", "targets", "weights"]
    adapter = [s.name for s in adapter_specs(base, shape)]
    assert train.names[-len(adapter) :] == evaluate.names[-len(adapter) :] == adapter
    assert train.names[5:12] == [f"objective.{name}" for name in local_objective.INPUTS]
    assert train.names[12] == "objective.logit_bias"
    seen = [f"layers.{layer}.{s}" for layer in (0, 1) for s in ("routed", "kept", "taylor")]
    assert train.output_names() == ("loss", *seen, *(f"grad.{name}" for name in adapter))
    statistics = [f"layers.{layer}.{s}" for layer in (0, 1) for s in STATISTICS]
    assert evaluate.output_names() == ("logits", *statistics)
    specs = {s.name: s for s in train.specs}
    assert specs["layers.1.target"].shape == (4,)
    assert specs["layers.1.gate_up.a"].shape == ((4 + 4 + 2) * 64,)
    assert specs["layers.1.down.b"].shape == ((4 + 4 + 2) * 64,)
    wide, narrow = 64 * 64, 64 * 64 // 2  # of gate_up, [2 * 32, 64]
    assert specs["layers.0.gate_up.packed"].shape == (2 * wide + 2 * narrow,)
    assert specs["layers.0.gate_up.scale"].shape == (4 * 64 * 64 // 32,)
    assert not any("expert" in name or "mlp.gate" in name for name in specs)
    assert [n for n in evaluate.names if n not in specs] == [
        f"layers.{layer}.{name}" for layer in (0, 1) for name in ("router_all", "resident")
    ]


def test_weights_of_rows_without_an_answer_do_not_divide_by_zero(artifact, adapter, batch):
    model = model_of(artifact, evaluate=False)
    nothing = dataclasses.replace(batch, weights=np.zeros_like(batch.weights))
    outputs = model(*arguments(artifact, model, adapter, nothing))
    assert outputs[0] == 0
    assert all(torch.isfinite(value).all() for value in outputs)


def test_what_is_kept_between_the_passes(graph):
    """Products, transposes and sigmoids are computed again; equal nodes, squares and empty views are gone."""
    model, captured, *_ = graph
    nodes = list(captured.graph.nodes)
    targets = [str(node.target) for node in nodes]
    assert not any(
        "pow.Tensor_Scalar" in t and n.args[1] == 2 for n, t in zip(nodes, targets, strict=True)
    )
    assert not any("index_put" in t for t in targets)  # gradients are no scatter with accumulation
    assert sum("packed_embedding" in t for t in targets) == 1
    assert sum("routed_experts_backward" in t for t in targets) == (0 if model.evaluate else 2)
    if model.evaluate:
        return
    boundary = nodes.index(nodes[-1].args[0][0])  # the loss
    cheap = ("aten.mul.Tensor", "aten.sigmoid", "aten.permute", "aten.transpose", "aten.neg")
    for node in nodes[: boundary + 1]:
        later = [u for u in node.users if nodes.index(u) > boundary and u.op != "output"]
        assert not (later and any(c in str(node.target) for c in cheap)), node
