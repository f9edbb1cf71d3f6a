import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import topics
from protocol.topics import UpTopic

ids = st.from_regex(topics.ID, fullmatch=True)


@given(ids, ids, ids, st.integers(0, 10**7 - 1))
def test_what_a_device_writes_to_is_read_back(fleet, device, xfer, index):
    assert topics.parse_up(topics.status(fleet, device)) == UpTopic(fleet, device, "status")
    assert topics.parse_up(topics.up_ctl(fleet, device)) == UpTopic(fleet, device, "ctl")
    chunk = topics.parse_up(topics.up_chunk(fleet, device, xfer, index))
    assert chunk == UpTopic(fleet, device, "chunk", xfer, index)


@given(ids, ids)
def test_what_the_server_writes_to_is_nothing_from_a_device(fleet, device):
    for topic in (
        topics.down_ctl(fleet, device), topics.down_receipt(fleet, device), topics.round_info(fleet)
    ):  # fmt: skip
        assert topics.parse_up(topic) is None


@given(st.text(max_size=60))
def test_any_text_is_parsed_or_not(text):
    assert topics.parse_up(text) is None
    assert topics.parse_up("fl/v1/" + text) is None or "/" in text


def test_ids_cannot_leave_their_level():
    for bad in ("a/b", "+", "#", "", "a" * 65, "-a", "a b", "ä", "a\n"):
        assert not topics.ID.fullmatch(bad)
    for bad in (
        "fl/v1/f/d/up/x/12345678",
        "fl/v1/f/d/up/x/-1",
        "fl/v1/f/d/up/x/1\n",
        "fl/v2/f/d/up/ctl",
    ):
        assert topics.parse_up(bad) is None


@pytest.mark.parametrize(
    "topic", [topics.status("f", "d"), topics.up_ctl("f", "d"), topics.up_chunk("f", "d", "x", 3)]
)
def test_the_server_subscribes_to_all_of_it(topic):
    def matches(pattern):
        levels = list(zip(pattern.split("/"), topic.split("/"), strict=False))
        same = pattern.count("/") == topic.count("/")
        return same and all(p in ("+", t) for p, t in levels)

    assert sum(map(matches, topics.server_filters("f"))) == 1
