"""The lowered programs against eager PyTorch and against transformers' own model."""

import numpy as np
import pytest
import torch
from executorch.extension.pybindings.portable_lib import _load_for_executorch
from executorch.extension.training import _load_for_executorch_for_training_from_buffer
from transformers import OlmoeForCausalLM

from export import families, graph_passes
from export.programs import _distinct_values
from export.to_executorch import lower
from export.train_graph import SubModel, capture_training, example
from protocol import int4, tensors
from protocol.manifest import Shape, read_base, read_manifest

RESIDENT = {0: [0, 1, 3], 1: [1, 2]}


@pytest.fixture(scope="module")
def base(store):
    return read_base(store / "base.json")


@pytest.fixture(scope="module")
def artifact(store):
    return read_manifest(store / "small" / "manifest.json")


def inputs(store, base, artifact, program, seed=0):
    """Real weights of the resident experts, random text and a random adapter."""
    torch.manual_seed(seed)
    shape = artifact.shape
    dense = tensors.decode((store / "blobs" / base.dense.sha256).read_bytes())
    given = {
        "tokens": torch.randint(0, 300, (shape.batch, shape.sequence)),
        "valid": torch.ones(shape.batch, shape.sequence),
        "positions": torch.stack(
            [b * shape.sequence + torch.arange(3, 3 + shape.answers) for b in range(shape.batch)]
        ),
        "targets": torch.randint(0, 300, (shape.batch, shape.answers)),
        "weights": torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 1]]),
    }
    given |= {f"dense.{n}": torch.from_numpy(v.astype(np.float32)) for n, v in dense.items()}
    for position, layer in enumerate(base.moe_layers):
        ids = RESIDENT[layer]
        router = torch.from_numpy(dense[f"layers.{layer}.router"])
        given[f"layers.{layer}.router_rows"] = router[ids]
        given[f"layers.{layer}.router_all"] = router
        given[f"layers.{layer}.resident"] = torch.zeros(4).index_fill(0, torch.tensor(ids), 1.0)
        blobs = [
            tensors.decode((store / "blobs" / base.experts[position][e].sha256).read_bytes())
            for e in ids
        ]
        for name in ("gate_up.packed", "gate_up.scale", "down.packed", "down.scale"):
            value = torch.from_numpy(np.concatenate([b[name] for b in blobs]))
            given[f"layers.{layer}.{name}"] = value.float() if name.endswith("scale") else value
    for spec in artifact.train.parameters:
        given[spec.name] = torch.randn(spec.shape) * 0.1
    return given, tuple(given[s.name] for s in program.inputs)


def sliced_transformers(store, base, given, checkpoint):
    """transformers' model with the absent experts cut out: softmax over the kept rows is masking them."""
    model = OlmoeForCausalLM.from_pretrained(checkpoint, experts_implementation="eager").eval()
    # the dense part is stored in float16; compare against what the device has
    dense = {n[6:]: v for n, v in given.items() if n.startswith("dense.")}
    model.load_state_dict(
        {n: v for n, v in dense.items() if not n.startswith("layers.")}, strict=False
    )
    for position, layer in enumerate(base.moe_layers):
        ids, block = RESIDENT[layer], model.model.layers[layer].mlp
        weights = {"gate_up": [], "down": []}
        for slot, e in enumerate(ids):
            blob = tensors.decode((store / "blobs" / base.experts[position][e].sha256).read_bytes())
            for name in weights:
                dense = torch.from_numpy(
                    int4.dequantize(blob[f"{name}.packed"], blob[f"{name}.scale"])
                )
                a, b = (given[f"layers.{layer}.{name}.{f}"][slot] for f in "ab")
                weights[name].append(dense + 2.0 * (a @ b).T)
        block.experts.gate_up_proj = torch.nn.Parameter(torch.stack(weights["gate_up"]))
        block.experts.down_proj = torch.nn.Parameter(torch.stack(weights["down"]))
        block.experts.num_experts = block.gate.num_experts = len(ids)
        rows = given[f"layers.{layer}.router_rows"] + given[f"layers.{layer}.router"]
        block.gate.weight = torch.nn.Parameter(rows)
    return model


def test_evaluation_program_equals_transformers_with_absent_experts_cut(
    store, base, artifact, tiny_checkpoint
):
    given, arguments = inputs(store, base, artifact, artifact.evaluate)
    program = _load_for_executorch(str(store / "blobs" / artifact.evaluate.blob.sha256))
    out = dict(zip(artifact.evaluate.outputs, program.forward(arguments), strict=True))
    model = sliced_transformers(store, base, given, tiny_checkpoint)
    with torch.no_grad():
        logits = model(input_ids=given["tokens"]).logits
    wanted = logits.reshape(-1, 300)[given["positions"].reshape(-1)].reshape(out["logits"].shape)
    torch.testing.assert_close(out["logits"], wanted, atol=1e-4, rtol=1e-4)
    tokens = given["tokens"].numel()
    for layer, ids in RESIDENT.items():
        mass = out[f"layers.{layer}.mass"]
        assert mass.sum().item() == pytest.approx(tokens, rel=1e-4)
        missed = out[f"layers.{layer}.missed"].item()
        assert missed == pytest.approx(tokens - mass[ids].sum().item(), rel=1e-3, abs=1e-3)


def test_training_program_has_eagers_loss_and_gradients(store, base, artifact, tiny_checkpoint):
    given, arguments = inputs(store, base, artifact, artifact.train)
    data = (store / "blobs" / artifact.train.blob.sha256).read_bytes()
    program = _load_for_executorch_for_training_from_buffer(data)
    program.forward_backward("forward", arguments)
    for name, value in program.named_parameters().items():
        value.copy_(given[name])
    loss = program.forward_backward("forward", arguments)[0]

    eager = SubModel(base, families.of(base.config, "here"), artifact.shape, evaluate=False)
    with torch.no_grad():
        for name, parameter in eager.named_parameters():
            parameter.copy_(given[name])
    wanted = eager(*arguments)[0]
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    gradients = program.named_gradients()
    assert set(gradients) == {s.name for s in artifact.train.parameters}
    for name, parameter in eager.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-3)

    model = sliced_transformers(store, base, given, tiny_checkpoint)
    with torch.no_grad():
        logits = model(input_ids=given["tokens"]).logits.reshape(-1, 300)
    nll = torch.nn.functional.cross_entropy(
        logits[given["positions"].reshape(-1)], given["targets"].reshape(-1), reduction="none"
    )
    weights = given["weights"].reshape(-1)
    assert loss.item() == pytest.approx(((nll * weights).sum() / weights.sum()).item(), rel=1e-4)


def test_every_parameter_has_memory_of_its_own(store, artifact):
    data = (store / "blobs" / artifact.train.blob.sha256).read_bytes()
    program = _load_for_executorch_for_training_from_buffer(data)
    program.forward_backward("forward", example(artifact.train.inputs))
    parameters = program.named_parameters()
    for value in parameters.values():
        value.zero_()
    first = next(iter(parameters))
    parameters[first].fill_(1.0)
    assert all(not v.any() for n, v in parameters.items() if n != first)


def test_passes_change_no_value_and_scatter_with_accumulation_is_gone(base):
    shape = Shape(batch=2, sequence=16, answers=4, rank=4, group=32, slots=(3, 2))
    model = SubModel(base, families.of(base.config, "here"), shape, evaluate=False)
    _distinct_values(model)
    program = capture_training(model)
    targets = [str(n.target) for n in program.graph.nodes]
    assert not any("index_put" in t for t in targets)
    assert not any(
        "pow.Tensor_Scalar" in t and n.args[1] == 2
        for n, t in zip(program.graph.nodes, targets, strict=True)
    )
    # dequantised once forward and once backward per projection, less what the lowest layer does not need
    assert sum("embedding_4bit" in t for t in targets) >= 6
    nodes = list(program.graph.nodes)
    boundary = nodes.index(nodes[-1].args[0][0])  # the loss
    kept = {n for n in nodes[: boundary + 1] if any(nodes.index(u) > boundary for u in n.users)}
    cheap = ("mul.Tensor", "sigmoid", "permute", "embedding_4bit")
    for node in kept:
        later = [u for u in node.users if nodes.index(u) > boundary and u.op != "output"]
        assert not (later and any(c in str(node.target) for c in cheap)), node
    assert lower(program).arena_bytes > 0
    assert graph_passes.gather_backward(program) == 0
