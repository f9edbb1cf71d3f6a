"""The work of a lease with a backend that can be followed by hand, and once with torch."""

import dataclasses

import numpy as np
import pytest

from edge import slots, trainer
from edge.data import Row, by_label, prompter
from edge.session import PLAIN, LayerStats, load_backend
from protocol.messages import Task
from protocol.objective import Objective

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

    def forward_backward(self, batch, terms=PLAIN):
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


@pytest.mark.parametrize("work", ["profile", "evaluate"])
def test_measuring_sends_no_adapter(artifact, setting, work):
    fake = Fake(artifact)
    result = run(fake, artifact, setting, work=work)
    assert fake.order == ["evaluate"]
    assert result.adapter == {}
    assert result.steps == 0
    assert result.before == result.after
    # Every batch gave one per expert: the held-back rows alone, or as many training rows as well.
    prompts, rows, _, job = setting
    looked_at = [rows[7:]]
    if work == "profile":
        order = np.random.default_rng(job.seed).permutation(7)
        looked_at.append([rows[i] for i in order[: prompts.batch]])
    batches = sum(len(list(by_label(prompts, part))) for part in looked_at)
    assert result.stats["mass"][0, 0] == batches


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


@pytest.mark.parametrize("factors", ["lora_A", "lora_B"])
def test_one_factor_is_trained_and_sent(artifact, setting, factors):
    fake = Fake(artifact)
    result = run(fake, artifact, setting, objective=Objective(factors=factors))
    other = {"lora_A": "lora_B", "lora_B": "lora_A"}[factors]
    assert len(result.adapter) == 2 * 3
    assert not any(n.endswith(other) for n in result.adapter)
    assert not any(v.any() for n, v in fake.values.items() if n.endswith(other))
    assert result.kept == {}


def test_a_personal_factor_stays_and_is_used_again(artifact, setting):
    fake = Fake(artifact)
    prompts, rows, adapter, job = setting
    job = dataclasses.replace(job, objective=Objective(personal=True))
    once = trainer.work(fake, artifact, adapter, job, prompts, rows[:7], rows[7:], lambda: None)
    assert sorted(once.kept) == [
        n for n in sorted(slots.names_of(TRAINED, fake.values)) if n.endswith("lora_B")
    ]
    assert not set(once.kept) & set(once.adapter)
    stale = {"layers.0.experts.0.down.lora_B": np.ones((32, 2), np.float32)}  # of a smaller slot
    other = {"layers.1.experts.5.down.lora_B": np.ones((32, 4), np.float32)}  # not resident now
    kept = {**once.kept, **stale, **other}
    again = trainer.work(
        fake, artifact, adapter, job, prompts, rows[:7], rows[7:], lambda: None, kept=kept
    )
    for name, value in again.kept.items():
        begun = 0 if name in stale else 1
        np.testing.assert_allclose(value, -0.3 * (1 + begun), rtol=1e-3, err_msg=name)
    for name, value in again.adapter.items():  # these started from the adapter again
        np.testing.assert_array_equal(value, once.adapter[name])


def test_control_variates_come_and_go(artifact, setting):
    fake = Fake(artifact)
    prompts, rows, adapter, job = setting
    job = dataclasses.replace(job, objective=Objective(scaffold=True))
    name = "layers.0.router.3"
    shared = {f"scaffold.{name}": np.full_like(adapter[name], -1)}
    kept = {f"scaffold.{name}": np.full_like(adapter[name], 0.25)}
    result = trainer.work(
        fake, artifact, adapter, job, prompts, rows[:7], rows[7:], lambda: None, shared, kept
    )
    assert set(result.control) == {f"scaffold.{n}" for n in result.adapter}
    assert set(result.kept) == set(result.control)
    np.testing.assert_array_equal(result.kept[f"scaffold.{name}"], 1)  # the raw gradient
    np.testing.assert_array_equal(result.control[f"scaffold.{name}"], 0.75)
    # 1 - 1 - 0.25 < 0: this row goes up, the others, uncorrected, down.
    assert (result.adapter[name] > 0).all()
    assert (result.adapter["layers.0.router.0"] < 0).all()


def test_the_targets_of_the_balance_follow_the_steps(artifact, setting):
    """Without an objective the terms are plain; a device of one label is asked for the routing it has."""

    class Listening(Fake):
        heard = ()

        def forward_backward(self, batch, terms=PLAIN):
            self.heard = (*self.heard, terms)
            routed = {0: np.float32([8, 0, 0, 0]), 1: np.float32([1, 1, 2])}
            return super().forward_backward(batch)[0], routed

    plain = Listening(artifact)
    run(plain, artifact, setting)
    assert plain.heard == (PLAIN,) * 3
    prompts, rows, adapter, job = setting
    job = dataclasses.replace(job, objective=Objective(target_balance=0.1, z_loss=0.5))
    for text, level in (("sport", False), (None, True)):
        mine = [Row(r.text, text or r.label) for r in rows]
        listening = Listening(artifact)
        trainer.work(listening, artifact, adapter, job, prompts, mine[:7], mine[7:], lambda: None)
        first, last = listening.heard[0], listening.heard[-1]
        assert (first.target_balance, first.z_loss, first.cap) == (0.1, 0.5, 0)
        np.testing.assert_allclose(first.targets[0], [0.25] * 4)  # the fake's router is even
        want = [0.25] * 4 if level else [0.25 * 0.81 + 0.19, *[0.25 * 0.81] * 3]
        np.testing.assert_allclose(last.targets[0], want, atol=0.005)


def test_output_scales_are_trained_and_stay(artifact, setting):
    class Scaled(Fake):
        def open_train(self, artifact, resident):
            super().open_train(artifact, resident)
            self.values |= {f"layers.{n}.output_scale": np.ones(1, np.float32) for n in (0, 1)}
            return self

        def load(self, adapter):
            super().load(
                {
                    "layers.0.output_scale": np.ones(1),
                    "layers.1.output_scale": np.ones(1),
                    **adapter,
                }
            )

    prompts, rows, adapter, job = setting
    still = Scaled(artifact)
    assert run(still, artifact, setting).kept == {}
    assert still.values["layers.0.output_scale"] == 1
    job = dataclasses.replace(job, objective=Objective(output_scale=True))
    kept = {"layers.0.output_scale": np.full(1, 2, np.float32)}
    result = trainer.work(
        Scaled(artifact), artifact, adapter, job, prompts, rows[:7], rows[7:], lambda: None, kept=kept
    )  # fmt: skip
    assert set(result.kept) == {"layers.0.output_scale", "layers.1.output_scale"}
    assert result.kept["layers.0.output_scale"] == pytest.approx(1.7, abs=1e-3)
    assert result.kept["layers.1.output_scale"] == pytest.approx(0.7, abs=1e-3)
    assert not any("scale" in n for n in result.adapter)
