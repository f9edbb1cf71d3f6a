"""The torch session against transformers itself, and its aliases against arithmetic by hand."""

import numpy as np
import pytest

from edge import session, slots
from edge.data import Row, prompter
from protocol import lora
from protocol.messages import Task

RESIDENT = {0: (5, 0, 3, 2), 1: (4, 1, 2)}
TASK = Task(labels=("sport", "science", "finance"))


def fresh_adapter(base, shape, resident, rng=None):
    adapter = {}
    for name in slots.adapter_names(resident):
        layer, kind = name.split(".")[1], name.rsplit(".", 1)[-1]
        if kind in ("lora_A", "lora_B"):
            out, features = base.features(name.split(".")[-2])
            if kind == "lora_A":
                adapter[name] = lora.fresh_a(name, shape.rank, features)
            else:
                adapter[name] = np.zeros((out, shape.rank), np.float32)
        else:
            adapter[name] = np.zeros(base.hidden, np.float32)
        if rng is not None:
            adapter[name] = rng.normal(0, 0.1, adapter[name].shape).astype(np.float32)
        assert int(layer) in resident
    return adapter


@pytest.fixture(scope="module", params=["torch", "torch-nf4"])
def backend(request):
    return session.load_backend(request.param)


@pytest.fixture(scope="module")
def batch(artifact, tokenizer):
    s = artifact.manifest.shape
    rows = [
        Row("a goal for the team", "sport"),
        Row("the galaxy", "science"),
        Row("shares", "finance"),
    ]
    return prompter(tokenizer, TASK, s.batch, s.sequence, s.answers).assemble(rows, None)


def everything(artifact):
    """All six experts resident: the sub-MoE is then the base."""
    import dataclasses

    shape = dataclasses.replace(artifact.manifest.shape, slots=(6, 6))
    manifest = dataclasses.replace(artifact.manifest, shape=shape)
    return dataclasses.replace(artifact, manifest=manifest)


def test_all_experts_resident_is_the_base_model(artifact, tiny_model, batch):
    import torch

    whole = everything(artifact)
    resident = {0: tuple(range(6)), 1: (3, 2, 1, 0, 5, 4)}
    opened = session.load_backend("torch").open_evaluate(whole, resident)
    adapter = slots.slot_arrays(
        fresh_adapter(artifact.base, whole.manifest.shape, resident),
        resident,
        artifact.base,
        whole.manifest.shape,
    )
    logits, stats = opened.evaluate(batch, adapter)
    with torch.no_grad():
        full = tiny_model(torch.from_numpy(batch.tokens)).logits.numpy()
    wanted = full.reshape(-1, full.shape[-1])[batch.positions]
    np.testing.assert_allclose(logits, wanted, atol=1e-4)
    tokens = batch.valid.sum()
    for layer in stats.values():
        assert layer.missed == pytest.approx(0, abs=1e-4)
        assert layer.mass.sum() == pytest.approx(tokens, rel=1e-5)
        assert (layer.top <= layer.mass + 1e-6).all()
        assert (layer.g_log_g <= 0).all()
    opened.close()


def test_gradients_are_those_of_the_loss(artifact, batch, backend):
    shape, base = artifact.manifest.shape, artifact.base
    opened = backend.open_train(artifact, RESIDENT)
    rng = np.random.default_rng(1)
    opened.load(slots.slot_arrays(fresh_adapter(base, shape, RESIDENT, rng), RESIDENT, base, shape))
    parameters = opened.parameters()
    assert {n: v.shape for n, v in parameters.items()} == slots.parameter_shapes(base, shape)
    _, routed = opened.forward_backward(batch)
    gradients = {n: v.copy() for n, v in opened.gradients().items()}
    assert {n: v.shape for n, v in gradients.items()} == slots.parameter_shapes(base, shape)
    for layer, counts in routed.items():
        assert counts.shape == (len(RESIDENT[layer]),)
        assert counts.sum() == batch.valid.sum() * base.top_k
    for name, gradient in gradients.items():
        place = np.unravel_index(np.abs(gradient).argmax(), gradient.shape)
        before, step = parameters[name][place], 1e-3  # small: routing must not flip
        losses = []
        for sign in (1, -1):
            parameters[name][place] = before + sign * step
            losses.append(opened.forward_backward(batch)[0])
        parameters[name][place] = before
        slope = (losses[0] - losses[1]) / (2 * step)
        assert slope == pytest.approx(gradient[place], rel=0.05, abs=5e-3), name
    opened.close()


def test_training_and_evaluating_give_the_same_loss(artifact, batch, backend):
    from edge.statistics import Score

    shape, base = artifact.manifest.shape, artifact.base
    rng = np.random.default_rng(2)
    adapter = slots.slot_arrays(fresh_adapter(base, shape, RESIDENT, rng), RESIDENT, base, shape)
    train = backend.open_train(artifact, RESIDENT)
    train.load(adapter)
    loss, _ = train.forward_backward(batch)
    train.close()
    reader = backend.open_evaluate(artifact, RESIDENT)
    logits, stats = reader.evaluate(batch, adapter)
    score = Score()
    score.add(logits, batch, None)
    assert score.loss == pytest.approx(loss, rel=1e-5)
    held = list(RESIDENT[0])
    assert stats[0].missed == pytest.approx(batch.valid.sum() - stats[0].mass[held].sum(), rel=1e-4)
    assert (stats[0].output_norm > 0).any()
    reader.close()


def test_twenty_steps_lower_the_loss(artifact, batch, backend):
    from edge.adamw import AdamW

    shape, base = artifact.manifest.shape, artifact.base
    opened = backend.open_train(artifact, RESIDENT)
    opened.load(slots.slot_arrays(fresh_adapter(base, shape, RESIDENT), RESIDENT, base, shape))
    parameters = opened.parameters()
    optimizer = AdamW(dict.fromkeys(parameters, 5e-3))
    losses = []
    for _ in range(20):
        losses.append(opened.forward_backward(batch)[0])
        optimizer.step(parameters, opened.gradients())
    assert losses[-1] < 0.5 * losses[0]
    opened.close()
