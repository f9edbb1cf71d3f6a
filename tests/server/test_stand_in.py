import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.stand_in import (
    NOTHING,
    StandInError,
    masked,
    merge,
    merge_router,
    merge_weights,
    nearest,
    reroute,
    similarity,
)

SEEDS = st.integers(0, 2**32 - 1)


def layer(seed, experts=8, width=6, tokens=20):
    """Router rows, tokens, softmax over all experts, residents."""
    rng = np.random.default_rng(seed)
    rows, x = rng.normal(size=(experts, width)), rng.normal(size=(tokens, width))
    resident = rng.permutation(experts)[: rng.integers(1, experts)].tolist()
    return rows, x, softmax(x @ rows.T), resident


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def swiglu(x, gate, up, down):
    h = x @ gate.T
    return (h / (1 + np.exp(-h)) * (x @ up.T)) @ down.T


@given(SEEDS)
def test_masking_is_a_map_to_nothing(seed):
    rows, x, g, resident = layer(seed)
    logits = x @ rows.T
    logits[:, [e for e in range(8) if e not in resident]] = -np.inf
    onto = reroute(g, masked(8, resident), len(resident))
    missed = 1 - onto.sum(-1)
    np.testing.assert_allclose(missed, 1 - g[:, resident].sum(-1), atol=1e-12)
    np.testing.assert_allclose(
        onto / onto.sum(-1, keepdims=True), softmax(logits)[:, resident], atol=1e-12
    )
    # So is the nearest resident when nothing is near enough.
    alike = similarity(rows)
    np.testing.assert_array_equal(nearest(alike, resident, least=1.01), masked(8, resident))


@given(SEEDS)
def test_the_map_is_idempotent_and_loses_no_weight(seed):
    rows, _, g, resident = layer(seed)
    slot = nearest(similarity(rows), resident)
    served = np.array(resident)[slot]  # the expert that answers for each
    np.testing.assert_array_equal(served[resident], resident)
    np.testing.assert_array_equal(served[served], served)
    np.testing.assert_allclose(reroute(g, slot, len(resident)).sum(-1), 1)


@given(SEEDS)
def test_nearest_is_the_largest_cosine(seed):
    rows, _, _, resident = layer(seed)
    alike = similarity(rows)
    slot = nearest(alike, resident)
    for e in set(range(8)) - set(resident):
        cosine = [
            rows[e] @ rows[r] / np.linalg.norm(rows[e]) / np.linalg.norm(rows[r]) for r in resident
        ]
        assert slot[e] == np.argmax(cosine)


def test_a_twin_of_an_absent_expert_answers_as_it_would():
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=(4, *shape)) for shape in ((5, 3), (5, 3), (3, 5))]
    for w in weights:
        w[3] = w[1]
    x, g = rng.normal(size=(7, 3)), softmax(rng.normal(size=(7, 4)))
    outputs = np.stack([swiglu(x, *(w[e] for w in weights)) for e in range(4)])
    slot = nearest(similarity(outputs.reshape(4, -1)), [0, 1, 2])
    assert slot.tolist() == [0, 1, 2, 1]
    full = np.einsum("ne,end->nd", g, outputs)
    part = np.einsum("nr,rnd->nd", reroute(g, slot, 3), outputs[:3])
    np.testing.assert_allclose(part, full, atol=1e-12)


def test_merge_weights_by_hand():
    f, a = np.array([0.4, 0.3, 0.2, 0.1]), np.array([1.0, 1.0, 3.0, 0.0])
    np.testing.assert_allclose(merge_weights(f, a, [0]), [0, 1 / 3, 2 / 3, 0])
    np.testing.assert_allclose(merge_weights(np.zeros(4), a, [0, 3]), [0, 0.5, 0.5, 0])
    with pytest.raises(StandInError, match="nothing to merge"):
        merge_weights(f, a, [0, 1, 2, 3])


@given(SEEDS)
def test_a_merge_of_equal_experts_is_that_expert(seed):
    rng = np.random.default_rng(seed)
    one = rng.normal(size=(4, 3)).astype(np.float32)
    row = rng.normal(size=3).astype(np.float32)
    alpha = merge_weights(rng.random(6), rng.random(6), [0, 1])
    merged = merge(alpha, np.broadcast_to(one, (6, 4, 3)))
    assert merged.dtype == np.float32
    np.testing.assert_allclose(merged, one, rtol=1e-6)
    np.testing.assert_allclose(merge_router(alpha, np.tile(row, (6, 1)))[0], row, rtol=1e-6)


def test_the_joint_weight_of_equal_experts_is_kept():
    rng = np.random.default_rng(1)
    rows, x = rng.normal(size=(5, 3)), rng.normal(size=(9, 3))
    rows[2:] = rows[2]
    full = softmax(x @ rows.T)
    row, bias = merge_router(merge_weights(np.ones(5), np.ones(5), [0, 1]), rows)
    logits = np.concatenate([x @ rows[:2].T, x @ row[:, None] + bias], 1)
    np.testing.assert_allclose(softmax(logits)[:, 2], full[:, 2:].sum(1), atol=1e-12)


@given(SEEDS)
def test_the_merged_logit_never_exceeds_the_joint_one(seed):
    rows, x, g, resident = layer(seed)
    absent = [e for e in range(8) if e not in resident]
    row, bias = merge_router(merge_weights(g.sum(0), np.ones(8), resident), rows)
    joint = np.log(np.exp(x @ rows[absent].T).sum(-1))
    assert (x @ row + bias <= joint + 1e-9).all()


@pytest.mark.parametrize("resident", [[], [1, 1], [4], [-1]])
def test_residents_that_cannot_be(resident):
    with pytest.raises(StandInError):
        nearest(np.eye(4), resident)
    assert NOTHING not in masked(2, [0, 1])
