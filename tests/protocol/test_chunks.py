import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import chunks
from protocol.chunks import ChunkError


@given(st.binary(max_size=500), st.integers(1, 120))
def test_what_is_cut_comes_together_again(data, size):
    total = chunks.count(len(data), size)
    pieces = [chunks.parse(chunks.cut(data, i, size)) for i in range(total)]
    assert b"".join(p.body for p in pieces) == data
    assert [(p.index, p.count) for p in pieces] == [(i, total) for i in range(total)]


@given(st.binary(max_size=100))
def test_any_other_bytes_are_refused(data):
    with pytest.raises(ChunkError):
        chunks.parse(data)


@given(st.binary(min_size=1, max_size=60), st.data())
def test_a_flipped_bit_of_the_body_is_seen(body, data):
    wire = bytearray(chunks.cut(body, 0, 100))
    position = data.draw(st.integers(len(wire) - len(body), len(wire) - 1))
    wire[position] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(ChunkError, match="wrong checksum"):
        chunks.parse(bytes(wire))


@given(st.binary(max_size=60), st.integers(0, 79))
def test_a_cut_off_chunk_is_refused(body, length):
    wire = chunks.cut(body, 0, 100)
    if length < len(wire):
        with pytest.raises(ChunkError):
            chunks.parse(wire[:length])


def test_the_format_by_hand():
    # magic, index 1, count 2, length 1, CRC-32 of "c", "c"
    wire = "4d4331000100000002000000010000006fdfb90663"
    assert chunks.cut(b"abc", 1, 2).hex() == wire


def test_an_index_outside_the_count_is_refused():
    wire = bytearray(chunks.cut(b"ab", 1, 1))
    wire[4] = 2
    with pytest.raises(ChunkError, match="chunk 2 of 2"):
        chunks.parse(bytes(wire))
