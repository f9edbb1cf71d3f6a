"""The upload's state machine, with lost, late, repeated and strange messages; no broker, no clock."""

from hypothesis import given, settings
from hypothesis import strategies as st

from edge.deliver import OFFER_EVERY, QUIET, STUCK, Delivery, SendChunk, SendOffer
from protocol import chunks
from protocol.messages import Grant, Receipt


def grant(xfer="x1", window=2, lease="l", chunk_bytes=10):
    return Grant(lease=lease, xfer=xfer, chunk_bytes=chunk_bytes, window=window)


def receipt(missing=(), final=False, accepted=False, xfer="x1", lease="l"):
    return Receipt(
        lease=lease, xfer=xfer, missing=tuple(missing), final=final, accepted=accepted, reason=""
    )


def sent(actions):
    return [a.index for a in actions if isinstance(a, SendChunk)]


def test_an_offer_is_repeated_until_granted():
    d = Delivery("l", 35)
    assert d.actions(0) == [SendOffer()]
    assert d.actions(1) == []
    assert d.actions(OFFER_EVERY) == [SendOffer()]
    d.on_grant(grant(), 4)
    assert sent(d.actions(4)) == [0, 1]
    assert d.actions(8) == []  # the window is full


def test_the_window_moves_with_pubacks_and_only_a_final_receipt_ends_it():
    d = Delivery("l", 35)
    d.actions(0)
    d.on_grant(grant(), 0)
    order = sent(d.actions(0))
    while order[-1] != 3:
        d.on_sent("x1", order[-1], 1)
        order += sent(d.actions(1))
    for index in range(4):
        d.on_sent("x1", index, 1)
    assert order == [0, 1, 2, 3]
    assert not d.over
    d.on_receipt(receipt(missing=[2]), 1)
    assert sent(d.actions(1)) == [2]
    d.on_receipt(receipt(final=True, accepted=True), 2)
    assert d.over
    assert d.outcome.accepted
    assert d.actions(99) == []


def test_silence_leads_to_a_new_offer_and_a_repeated_grant_to_all_chunks():
    d = Delivery("l", 15)
    d.actions(0)
    d.on_grant(grant(), 0)
    d.actions(0)
    for index in (0, 1):
        d.on_sent("x1", index, 0)
    assert d.actions(QUIET - 1) == []
    assert d.actions(QUIET + 1) == [SendOffer()]
    d.on_grant(grant(), QUIET + 2)
    assert sent(d.actions(QUIET + 2)) == [0, 1]


def test_lost_pubacks_do_not_block_for_ever():
    d = Delivery("l", 35)
    d.actions(0)
    d.on_grant(grant(), 0)
    d.actions(0)
    assert d.actions(STUCK - 1) == []
    assert SendOffer() in d.actions(STUCK + 1)


def test_a_new_grant_starts_over_and_a_duplicate_does_not():
    d = Delivery("l", 35)
    d.actions(0)
    d.on_grant(grant(), 0)
    assert sent(d.actions(0)) == [0, 1]
    d.on_grant(grant(), 0)
    assert d.actions(0) == []
    d.on_grant(grant(xfer="x2", chunk_bytes=20, window=9), 1)
    assert d.actions(1) == [SendChunk("x2", 0, 20), SendChunk("x2", 1, 20)]


def test_a_reconnection_asks_again_at_once():
    d = Delivery("l", 5)
    d.actions(0)
    d.on_grant(grant(), 0)
    d.actions(0)
    d.on_reconnected()
    assert d.actions(0.1) == [SendOffer()]


def test_what_was_in_flight_is_sent_again_after_a_reconnection():
    d = Delivery("l", 35)
    d.actions(0)
    d.on_grant(grant(), 0)
    assert sent(d.actions(0)) == [0, 1]
    d.on_reconnected()
    d.on_grant(grant(), 1)
    assert sent(d.actions(1)) == [0, 1]


def test_strange_messages_are_ignored():
    d = Delivery("l", 35)
    d.on_grant(grant(lease="other"), 0)
    d.on_grant(grant(window=0), 0)
    d.on_grant(grant(xfer="a/#"), 0)
    d.on_receipt(receipt(lease="other", final=True), 0)
    d.on_receipt(receipt(missing=[1]), 0)
    assert d.grant is None
    assert not d.over
    d.on_grant(grant(), 0)
    d.on_receipt(receipt(missing=[7, 99]), 0)
    d.on_receipt(receipt(missing=[1], xfer="x9"), 0)
    d.on_sent("x9", 0, 0)
    assert sent(d.actions(0)) == [0, 1]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_every_chunk_arrives_whatever_is_lost(data):
    """A lossy server that answers offers and reports what is missing always gets the whole."""
    size = data.draw(st.integers(0, 95))
    body = bytes(range(size))
    d, got, now, finished = Delivery("l", size), {}, 0.0, False
    lossy = data.draw(st.integers(0, 30))
    for turn in range(400):
        now += 0.5
        lose = turn < lossy and data.draw(st.booleans())
        for action in d.actions(now):
            if isinstance(action, SendOffer):
                if not lose:
                    d.on_grant(grant(window=data.draw(st.integers(1, 4))), now)
            else:
                d.on_sent(
                    action.xfer, action.index, now
                )  # a PUBACK, even when the chunk is then lost
                if not lose:
                    chunk = chunks.parse(chunks.cut(body, action.index, action.chunk_bytes))
                    got[chunk.index] = chunk.body
        total = chunks.count(size, 10)
        missing = [i for i in range(total) if i not in got]
        if d.grant is not None and turn % 4 == 0:
            finished = not missing
            d.on_receipt(receipt(missing=missing, final=finished, accepted=finished), now)
        if d.over:
            break
    assert finished
    assert d.over
    assert b"".join(got[i] for i in range(len(got))) == body
