"""Experts that a batch of 32 rows touches: their union grows with the batch, the cap holds it."""

import dataclasses

import numpy as np
import pytest

from edge import session, slots
from edge.data import Row, prompter
from edge.session import PLAIN, Terms
from protocol import lora, names
from protocol.manifest import Slot
from tests.edge.conftest import TOPICS
from tests.edge.test_session_torch import TASK

EVERYONE = {0: tuple(range(6)), 1: tuple(range(6))}
ROWS = [Row(TOPICS[label], label) for label in TOPICS for _ in range(11)][:32]


@pytest.fixture(scope="module", params=["torch", "torch-routed"])
def wide(request, artifact):
    """A training session of 32 rows with all experts resident."""
    shape = dataclasses.replace(
        artifact.manifest.shape, batch=32, slots=((Slot(format="int4", rank=4),) * 6,) * 2
    )
    manifest = dataclasses.replace(artifact.manifest, shape=shape)
    whole = dataclasses.replace(artifact, manifest=manifest)
    opened = session.load_backend(request.param).open_train(whole, EVERYONE)
    rng = np.random.default_rng(0)
    opened.load(
        {
            name: lora.fresh_a(name, *size)
            if name.endswith("lora_A")
            else rng.normal(0, 0.05, size).astype(np.float32)
            for name, size in slots.adapter_shapes(whole.base, shape, EVERYONE).items()
        }
    )
    yield opened, shape
    opened.close()


def touched(wide, tokenizer, rows, terms=PLAIN):
    """Layer -> (experts that got tokens, experts that got a gradient)."""
    opened, s = wide
    batch = prompter(tokenizer, TASK, s.batch, s.sequence, s.answers).assemble(rows, None)
    _, routed = opened.forward_backward(batch, terms)
    moved = {
        (parsed.layer, parsed.expert)
        for name, gradient in opened.gradients().items()
        if (parsed := names.parse(name)) is not None and parsed.factor and gradient.any()
    }
    return {
        layer: (
            {e for e, n in zip(EVERYONE[layer], counts, strict=True) if n},
            {e for la, e in moved if la == layer},
        )
        for layer, counts in routed.items()
    }


def test_the_union_of_a_batch_grows_and_the_cap_holds_it(wide, tokenizer):
    short = [Row("a", "sport")]
    few, many = (touched(wide, tokenizer, rows) for rows in (short, ROWS))
    assert all(len(used) == 6 for used, _ in many.values())
    assert sum(len(used) for used, _ in few.values()) < 12
    for cap in (2, 3, 4):
        capped = touched(wide, tokenizer, ROWS, Terms(cap=cap))
        for used, moved in capped.values():
            assert len(used) <= cap
            assert moved
            assert moved <= used
