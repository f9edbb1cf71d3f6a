import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import tensors, update
from protocol.tensors import TensorError
from protocol.update import Facts

FACTS = Facts(
    rows=3, tokens=9, steps=1, loss_first=2.0, loss_last=1.5, accuracy_before=-1.0, accuracy_after=-1.0,
    loss_before=2.0, loss_after=1.0, held_back_rows=1, missed_mass=(0.1, 0.25), backend="x",
    baseline_bytes=1, peak_bytes=2, budget_bytes=3, seconds=0.5, bytes_down=4,
)  # fmt: skip
ADAPTER = {"layers.0.router.1": np.arange(4, dtype=np.float32)}
STATS = {name: np.full((2, 3), i, np.float32) for i, name in enumerate(update.STATS)}


def test_an_update_survives():
    data = update.pack(ADAPTER, STATS, FACTS)
    adapter, stats, facts = update.unpack(data, 10**6)
    assert facts == FACTS
    assert adapter.keys() == ADAPTER.keys()
    np.testing.assert_array_equal(adapter["layers.0.router.1"], ADAPTER["layers.0.router.1"])
    assert all(np.array_equal(stats[k], STATS[k]) for k in STATS)
    assert update.pack(ADAPTER, STATS, FACTS) == data


@pytest.mark.parametrize(
    ("raw", "line"),
    [
        (None, "update without facts"),
        (np.zeros(2, np.float32), "update without facts"),
        (np.frombuffer(b"{", np.uint8), "unreadable facts"),
        (np.frombuffer(b"\xff\xfe", np.uint8), "unreadable facts"),
        (np.frombuffer(b'{"rows": 1}', np.uint8), "key 'tokens' is missing"),
        (np.frombuffer(b"[" * 9999, np.uint8), "unreadable facts"),
    ],
)
def test_bad_facts(raw, line):
    data = tensors.encode({"a": np.zeros(1, np.float32)} if raw is None else {"facts": raw})
    with pytest.raises(TensorError, match=line):
        update.unpack(data, 10**6)


@given(st.sampled_from(sorted(FACTS.__dict__)), st.sampled_from([{}, None, float("nan")]))
def test_a_wrong_fact_is_refused(key, value):
    text = json.dumps({**FACTS.__dict__, key: value}).encode()
    with pytest.raises(TensorError, match=key):
        update.unpack(tensors.encode({"facts": np.frombuffer(text, np.uint8)}), 10**6)
