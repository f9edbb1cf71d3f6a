import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from benchmarks.federated.fit import Fitter, around
from reference_base import MODEL_DIR


@pytest.fixture(scope="module")
def fitter():
    return Fitter(Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json")))


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=120), room=st.integers(0, 30), keep=st.sampled_from(["start", "end"]))
def test_as_much_as_fits_and_no_more(fitter, text, room, keep):
    words = text.encode("utf-8", "replace").decode().split()
    found = getattr(fitter, keep)(" ".join(words), room).split()
    kept = words[: len(found)] if keep == "start" else words[len(words) - len(found) :]
    assert found == kept
    # The frame of every prompt: what the words cost there is what was counted.
    tokens = fitter.count("Text: " + " ".join(found)) - fitter.count("Text:") if found else 0
    assert tokens == fitter.sizes(found).sum() <= room
    if len(found) < len(words):
        following = words[len(found)] if keep == "start" else words[len(words) - len(found) - 1]
        assert fitter.sizes([*found, following]).sum() > room


@settings(max_examples=300)
@given(data=st.data())
def test_a_window_holds_the_answer_and_is_full(data):
    sizes = np.array(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=20)))
    first = data.draw(st.integers(0, len(sizes) - 1))
    last = data.draw(st.integers(first, len(sizes) - 1))
    room = data.draw(st.integers(1, 40))
    share = data.draw(st.floats(0, 1))
    start, stop = around(sizes, first, last, room, share)
    assert 0 <= start <= first
    assert sizes[start:stop].sum() <= room
    if sizes[first : last + 1].sum() > room:  # of a longer answer, as much as fits
        assert start == first
        assert stop <= last
        assert sizes[start : stop + 1].sum() > room
        return
    assert stop > last
    used = sizes[start:stop].sum()
    assert start == 0 or used + sizes[start - 1] > room
    assert stop == len(sizes) or used + sizes[stop] > room


def test_the_share_moves_the_answer_through_the_window():
    sizes = np.ones(101, int)
    starts = [around(sizes, 50, 50, 21, share)[0] for share in (0.0, 0.25, 0.5, 1.0)]
    assert starts == [50, 45, 40, 30]
