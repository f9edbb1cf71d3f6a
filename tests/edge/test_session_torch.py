"""The torch session: its gradients against differences of its loss. Against transformers: tests/export/families."""

import numpy as np
import pytest

from edge import session, slots
from edge.data import Row, prompter
from protocol import lora, names
from protocol.messages import Task

RESIDENT = {0: (5, 0, 3, 2), 1: (4, 1, 2)}
TASK = Task(labels=("sport", "science", "finance"))


def adapter_of(artifact, rng=None):
    """Fresh factors as the server gives them, or random values throughout."""
    adapter = {}
    for name, size in slots.adapter_shapes(
        artifact.base, artifact.manifest.shape, RESIDENT
    ).items():
        if rng is not None:
            adapter[name] = rng.normal(0, 0.1, size).astype(np.float32)
        elif name.endswith("lora_A"):
            adapter[name] = lora.fresh_a(name, *size)
        else:
            adapter[name] = np.zeros(size, np.float32)
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


def test_gradients_are_those_of_the_loss(artifact, batch, backend):
    base, wanted = artifact.base, adapter_of(artifact, np.random.default_rng(1))
    opened = backend.open_train(artifact, RESIDENT)
    opened.load(wanted)
    parameters = opened.parameters()
    scales = {names.output_scale(layer): (1,) for layer in RESIDENT}
    shapes = {n: v.shape for n, v in wanted.items()} | scales
    assert {n: v.shape for n, v in parameters.items()} == shapes
    _, routed = opened.forward_backward(batch)
    gradients = {n: v.copy() for n, v in opened.gradients().items()}
    assert {n: v.shape for n, v in gradients.items()} == shapes
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

    adapter = adapter_of(artifact, np.random.default_rng(2))
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

    opened = backend.open_train(artifact, RESIDENT)
    opened.load(adapter_of(artifact))
    parameters = opened.parameters()
    optimizer = AdamW(dict.fromkeys(parameters, 5e-3))
    losses = []
    for _ in range(20):
        losses.append(opened.forward_backward(batch)[0])
        optimizer.step(parameters, opened.gradients())
    assert losses[-1] < 0.6 * losses[0]
    opened.close()
