"""The work of a lease with a backend that can be followed by hand, and once with torch."""

import dataclasses

import numpy as np
import pytest

from edge import slots, trainer
from edge.data import Row, prompter
from edge.session import LayerStats, load_backend
from protocol.messages import Task

RESIDENT = {0: (5, 0, 3, 2), 1: (4, 1, 2)}
TRAINED = {0: (0, 3), 1: ()}  # expert 2 of layer 0 sits in a slot that cannot train


class Fake:
    """Gradients of one everywhere; loss counts down; only one session may be open."""

    name = "fake"

    def __init__(self, artifact, loss=lambda step: 5.0 - step):
        self.base, self.shape = artifact.base, artifact.manifest.shape
        self.open, self.steps, self.loss, self.order = 0, 0, loss, []

    def _enter(self, what):
        assert self.open == 0
        self.open += 1
        self.order.append(what)
        return self

    def open_train(self, artifact, resident):
        self.values = {
            n: np.zeros(s, np.float32)
            for n, s in slots.adapter_shapes(self.base, self.shape, resident).items()
        }
        return self._enter("train")

    def open_evaluate(self, artifact, resident):
        return self._enter("evaluate")

    def close(self):
        self.open -= 1

    def load(self, adapter):
        for name, value in self.values.items():
            value[...] = adapter[name]

    def parameters(self):
        return self.values

    def forward_backward(self, batch):
        self.steps += 1
        routed = {layer: np.full(len(ids), 10, np.float32) for layer, ids in RESIDENT.items()}
        return self.loss(self.steps), routed

    def taylor(self):
        return {layer: np.ones(len(ids), np.float32) for layer, ids in RESIDENT.items()}

    def gradients(self):
        return {n: np.ones_like(v) for n, v in self.values.items()}

    def evaluate(self, batch, adapter):
        stats = {
            layer: LayerStats(
                *(np.ones(6, np.float32),) * 3,
                1.0,
                np.ones(len(ids), np.float32),
                *(np.ones(6, np.float32),) * 2,
            )
            for layer, ids in RESIDENT.items()
        }
        logits = np.zeros((*batch.positions.shape, self.base.vocabulary), np.float32)
        return logits, stats


@pytest.fixture
def setting(artifact, tokenizer):
    s = artifact.manifest.shape
    prompts = prompter(tokenizer, Task(labels=("sport", "science")), s.batch, s.sequence, s.answers)
    rows = [Row(f"the team {i}", ("sport", "science")[i % 2]) for i in range(10)]
    shapes = slots.adapter_shapes(artifact.base, s, RESIDENT)
    adapter = {n: np.zeros(v, np.float32) for n, v in shapes.items()}
    job = trainer.Job(
        work="train", resident=RESIDENT, trained=TRAINED, steps=3,
        learning_rate=0.1, router_learning_rate=0.01, seed=1,
    )  # fmt: skip
    return prompts, rows, adapter, job


def run(backend, artifact, setting, check=lambda: None, **changes):
    prompts, rows, adapter, job = setting
    job = dataclasses.replace(job, **changes)
    return trainer.work(backend, artifact, adapter, job, prompts, rows[:7], rows[7:], check)


def test_only_trained_experts_move_and_are_sent(artifact, setting):
    fake = Fake(artifact)
    result = run(fake, artifact, setting)
    assert fake.order == ["evaluate", "train", "evaluate"]
    assert fake.open == 0
    assert set(result.adapter) == set(slots.names_of(TRAINED, fake.values))
    assert len(result.adapter) == 2 * 5  # two pairs of factors and a router row each
    for name, value in result.adapter.items():
        rate = 0.01 if ".router." in name else 0.1
        np.testing.assert_allclose(value, -3 * rate, rtol=1e-4, err_msg=name)  # Adam's first steps
    for name, value in fake.values.items():
        assert value.all() if name in result.adapter else not value.any(), name
    tokens = result.stats["trained_tokens"]
    assert tokens[0].tolist() == [30, 0, 0, 30, 0, 0]
    assert tokens[1].tolist() == [0] * 6
    assert (result.losses, result.steps, result.held_back_rows) == ((4.0, 2.0), 3, 3)
    assert result.before[0] == pytest.approx(np.log(artifact.base.vocabulary))


@pytest.mark.parametrize(("work", "batches"), [("profile", 3), ("evaluate", 1)])
def test_measuring_sends_no_adapter(artifact, setting, work, batches):
    fake = Fake(artifact)
    result = run(fake, artifact, setting, work=work)
    assert fake.order == ["evaluate"]
    assert result.adapter == {}
    assert result.steps == 0
    assert result.before == result.after
    # Every batch gave one per expert: the held-back rows alone, or as many training rows as well.
    assert result.stats["mass"][0, 0] == (1 if work == "evaluate" else 2)


def test_a_loss_that_is_not_finite_ends_the_lease(artifact, setting):
    fake = Fake(artifact, loss=lambda step: float("nan") if step == 2 else 1.0)
    with pytest.raises(trainer.TrainingError, match="step 2: loss nan"):
        run(fake, artifact, setting)
    assert fake.open == 0


def test_a_lease_that_is_no_longer_wanted_is_left_between_steps(artifact, setting):
    fake = Fake(artifact)

    def check():
        if fake.steps == 2:
            raise trainer.Abandoned

    with pytest.raises(trainer.Abandoned):
        run(fake, artifact, setting, check)
    assert fake.open == 0
    assert fake.steps == 2


def test_frozen_experts_stay_bit_identical_in_torch(artifact, setting):
    prompts, rows, adapter, job = setting
    rng = np.random.default_rng(0)
    adapter = {n: rng.normal(0, 0.1, v.shape).astype(np.float32) for n, v in adapter.items()}
    able = slots.trained_of(
        {"0": (5, 0, 3), "1": (4, 1)}, RESIDENT, artifact.manifest.shape.slots
    )  # fmt: skip
    seen = {}

    class Watched:
        name = "torch"

        def __init__(self, inner):
            self.open_evaluate = inner.open_evaluate
            self._inner = inner

        def open_train(self, *arguments):
            seen["session"] = self._inner.open_train(*arguments)
            seen["close"], seen["session"].close = seen["session"].close, lambda: None
            return seen["session"]

    backend = Watched(load_backend("torch"))
    for trained in (TRAINED, able):
        wanted = dataclasses.replace(job, trained=trained)
        result = trainer.work(
            backend, artifact, adapter, wanted, prompts, rows[:7], rows[7:], lambda: None
        )
        values = seen["session"].parameters()
        assert set(result.adapter) == set(slots.names_of(trained, values))
        for name, value in values.items():
            # What is no part of an adapter are the output scales.
            assert (value == adapter.get(name, 1)).all() == (name not in result.adapter), name
        seen["close"]()
