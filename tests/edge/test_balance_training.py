"""What the heterogeneity-aware balance does in training: usage is levelled, and a device of one label loses nothing."""

import dataclasses

import numpy as np
import pytest

from edge import trainer
from edge.data import Row, prompter
from edge.session import load_backend
from protocol import lora
from protocol.manifest import Slot
from protocol.objective import Objective
from tests.edge.conftest import TOPICS
from tests.edge.test_session_torch import TASK

EVERYONE = {0: tuple(range(6)), 1: tuple(range(6))}


@pytest.fixture(scope="module")
def trained(artifact, tokenizer):
    """(labels of the device, objective) -> (mean entropy of expert usage over layers in nats, result)."""
    from edge import slots

    slot = Slot(format="int4", rank=4)
    shape = dataclasses.replace(artifact.manifest.shape, slots=((slot,) * 6,) * 2)
    manifest = dataclasses.replace(artifact.manifest, shape=shape)
    whole = dataclasses.replace(artifact, manifest=manifest)
    prompts = prompter(tokenizer, TASK, shape.batch, shape.sequence, shape.answers)
    adapter = {
        n: lora.fresh_a(n, *size) if n.endswith("lora_A") else np.zeros(size, np.float32)
        for n, size in slots.adapter_shapes(whole.base, shape, EVERYONE).items()
    }
    backend = load_backend("torch-routed")

    def run(labels, objective):
        rows = [Row(f"{TOPICS[label]} {i}", label) for i in range(8) for label in labels]
        job = trainer.Job(
            work="train", resident=EVERYONE, trained=EVERYONE, steps=15,
            learning_rate=0.01, router_learning_rate=0.02, seed=0, objective=objective,
        )  # fmt: skip
        nothing_trained = {"trained_counts": np.zeros((2, 6), np.float32)}
        result = trainer.work(
            backend, whole, adapter, job, prompts, rows, rows[:8], lambda: None, nothing_trained
        )
        usage = result.stats["trained_tokens"] / result.stats["trained_tokens"].sum(1)[:, None]
        logs = np.log(usage, out=np.zeros_like(usage), where=usage > 0)
        return float(-(usage * logs).sum(1).mean()), result

    return run


BALANCED = Objective(target_balance=1.0, target_mix=0.5)


@pytest.mark.parametrize("labels", [tuple(TOPICS), ("sport",)])
def test_usage_is_levelled_and_accuracy_is_not_lower(trained, labels):
    plain, without = trained(labels, Objective())
    level, balanced = trained(labels, BALANCED)
    assert level > plain + 0.02
    assert balanced.after[1] >= without.after[1]
    assert balanced.after[1] > balanced.before[1] or balanced.before[1] == 1
    assert balanced.after[0] < 1.1 * without.after[0] + 0.02


def test_a_device_of_one_label_is_moved_less_than_an_even_one(trained):
    """Its target is mostly the routing it has; that of an even device is uniform."""
    objective = dataclasses.replace(BALANCED, target_mix=0.0)
    gains = {}
    for labels in (tuple(TOPICS), ("sport",)):
        gains[len(labels)] = trained(labels, objective)[0] - trained(labels, Objective())[0]
    assert gains[3] > 0.02
    assert gains[1] < 0.5 * gains[3]
