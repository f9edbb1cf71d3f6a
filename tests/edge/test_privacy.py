"""Clipping and noise: hand-computed sums, the sensitivity as a bound that is reached, the noise's width."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge import privacy
from protocol import schema
from protocol.manifest import Blob
from protocol.messages import Lease, MessageError, decode, encode

ROWS = np.array([[[3.0, 1.0], [1.0, 0.5], [0.0, 0.0]]])


def test_a_row_counts_only_so_much():
    # Row 0 has an L1 norm of 4, halved; row 1 of 1.5, as it is; row 2 is empty.
    np.testing.assert_allclose(privacy.clipped_sum(ROWS[0], 2.0), [2.5, 1.0])
    np.testing.assert_allclose(privacy.clipped_sum(-ROWS[0], 2.0), [-2.5, -1.0])
    np.testing.assert_allclose(privacy.clipped_sum(ROWS[0], 0.0), [4.0, 1.5])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.floats(0.1, 50), st.integers(0, 2**31))
def test_removing_a_row_changes_no_more_than_the_sensitivity(rows, layers, clip, seed):
    rng, experts, hidden = np.random.default_rng(seed), 4, 16
    size = rng.lognormal(0, 3, (layers, rows, 1))
    for name, bound in privacy.bounds(experts, hidden).items():
        given_rows = rng.dirichlet(np.full(experts, 0.2), (layers, rows)) * size
        sums = [privacy.clipped_sum(layer, clip * bound) for layer in given_rows]
        without = [privacy.clipped_sum(layer[1:], clip * bound) for layer in given_rows]
        change = np.linalg.norm(np.subtract(sums, without))
        assert change <= privacy.sensitivity(clip, layers, experts, hidden)[name] * (1 + 1e-9)


def test_the_sensitivity_is_reached():
    row = np.array([[100.0, 0.0]])
    change = np.linalg.norm([privacy.clipped_sum(row, 5.0)] * 9)
    assert change == pytest.approx(privacy.sensitivity(5.0, 9, 2, 4)["mass"]) == pytest.approx(15.0)


def test_noise_has_the_width_it_says():
    stats = {n: np.full((40, 50), 1e6, np.float32) for n in ("mass", "output_norm")}
    stats["g_log_g"] = np.full((40, 50), -1e6, np.float32)
    stats["taylor"] = np.ones((40, 50), np.float32)
    found = privacy.noised(stats, 8.0, 0.5, 16, np.random.default_rng(0))
    for name, bound in (("mass", 1.0), ("output_norm", 4.0), ("g_log_g", math.log(50))):
        wanted = 0.5 * 8.0 * bound * math.sqrt(40)
        assert np.std(found[name] - stats[name].astype(np.float64)) == pytest.approx(
            wanted, rel=0.05
        )
        assert found[name].dtype == np.float32
    assert not found["taylor"].any()  # no sum over rows: nothing is known of what it gives away
    again = privacy.noised(stats, 8.0, 0.5, 16, np.random.default_rng(0))
    assert all((found[name] == again[name]).all() for name in stats)


def test_noise_leaves_no_impossible_number():
    stats = {n: np.zeros((4, 30), np.float32) for n in ("mass", "g_log_g", "output_norm", "top")}
    found = privacy.noised(stats, 1.0, 100.0, 16, np.random.default_rng(0))
    assert (found["g_log_g"] <= 0).all()
    assert found["g_log_g"].any()
    for name in ("mass", "output_norm", "top"):
        assert (found[name] >= 0).all()
        assert found[name].any()


def test_without_noise_nothing_changes_and_without_clip_there_is_none():
    stats = {"mass": np.ones((1, 2), np.float32)}
    assert privacy.noised(stats, 0.0, 0.0, 4, np.random.default_rng(0))["mass"] is stats["mass"]
    with pytest.raises(ValueError, match="hides nothing"):
        privacy.noised(stats, 0.0, 1.0, 4, np.random.default_rng(0))


LEASE = Lease(
    lease="l", run="r", round=0, attempt=1, work="profile", base_version=0, resident={}, trained={},
    adapter=Blob(sha256="0" * 64, bytes=1), steps=0, learning_rate=0.1, router_learning_rate=0.1,
    seed=0, seconds=1.0, nonce="n",
)  # fmt: skip


def test_a_lease_says_how_to_profile():
    asked = dataclasses.replace(
        LEASE, profile="full", profile_rows=9, profile_clip=32.0, profile_noise=0.5,
        profile_adapter=Blob(sha256="1" * 64, bytes=2),
    )  # fmt: skip
    assert decode(encode(asked)) == asked
    assert decode(encode(LEASE)).profile == "resident"
    text = encode(LEASE).replace(b'"profile_noise": 0.0', b'"profile_noise": 1.0')
    with pytest.raises(MessageError, match="profile_noise without profile_clip"):
        decode(text)
    with pytest.raises(schema.SchemaError, match="profile_rows -1"):
        dataclasses.replace(LEASE, profile_rows=-1)
