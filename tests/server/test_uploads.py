import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import chunks
from server.uploads import UploadError, Uploads

SIZE = 25


def data(size=SIZE):
    return bytes(range(size))


def grant(uploads, lease="l1", content=None, now=0.0, device="a"):
    content = data() if content is None else content
    return uploads.grant(
        lease=lease,
        device=device,
        size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        chunk_bytes=10,
        now=now,
    )


def chunk(index, content=None):
    return chunks.parse(chunks.cut(data() if content is None else content, index, 10))


@given(order=st.lists(st.integers(0, 2), max_size=6), again=st.booleans())
@settings(max_examples=30)
def test_any_order_with_duplicates_and_a_restart(tmp_path_factory, order, again):
    folder = tmp_path_factory.mktemp("uploads")
    uploads = Uploads(folder, 100, 0)
    upload = grant(uploads)
    for index in order:
        uploads.add("a", upload.granted.xfer, chunk(index), 1)
    if again:
        uploads = Uploads(folder, 100, 5)
        (upload,) = uploads.all()
    assert set(upload.missing(stalled=True)) == {0, 1, 2} - set(order)
    for index in upload.missing(stalled=True):
        uploads.add("a", upload.granted.xfer, chunk(index), 6)
    assert upload.complete
    assert uploads.path(upload).read_bytes() == data()
    assert uploads.check(upload)


def test_what_does_not_fit_the_grant_is_refused(tmp_path):
    uploads = Uploads(tmp_path, 100, 0)
    xfer = grant(uploads).granted.xfer
    with pytest.raises(UploadError, match="granted to another device"):
        uploads.add("b", xfer, chunk(0), 0)
    with pytest.raises(UploadError, match="chunk of 4, 3 granted"):
        uploads.add("a", xfer, chunk(0, data(40)), 0)
    with pytest.raises(UploadError, match="chunk 2 of 1 bytes, 5 wanted"):
        uploads.add("a", xfer, chunk(2, data(21)), 0)
    assert uploads.add("a", "unknown", chunk(0), 0) is None


def test_a_wrong_content_is_seen_and_can_be_sent_again(tmp_path):
    uploads = Uploads(tmp_path, 100, 0)
    upload = grant(uploads)
    for index in range(3):
        uploads.add("a", upload.granted.xfer, chunk(index, bytes(SIZE)), 0)
    assert not uploads.check(upload)
    uploads.restart(upload)
    assert upload.missing(stalled=True) == (0, 1, 2)


def test_granted_bytes_are_bounded_but_a_dead_upload_makes_room(tmp_path):
    uploads = Uploads(tmp_path, 40, 0)
    assert grant(uploads, "l1") is not None
    assert grant(uploads, "l2", device="b") is None
    assert grant(uploads, "l1", now=30) is not None  # the same again costs nothing
    assert grant(uploads, "l2", now=80, device="b") is None
    assert grant(uploads, "l2", now=91, device="b") is not None


def test_one_upload_larger_than_the_bound_is_still_possible(tmp_path):
    assert grant(Uploads(tmp_path, 10, 0)) is not None


def test_another_content_for_the_same_lease_replaces_the_former(tmp_path):
    uploads = Uploads(tmp_path, 100, 0)
    first = grant(uploads)
    second = grant(uploads, content=bytes(SIZE))
    assert uploads.all() == [second]
    assert first.granted.xfer != second.granted.xfer
    uploads.drop(second.granted.xfer)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_record_is_dropped_at_the_start(tmp_path):
    (tmp_path / "x.json").write_text("{")
    (tmp_path / "x.part").write_bytes(b"")
    assert Uploads(tmp_path, 100, 0).all() == []
    assert list(tmp_path.iterdir()) == []


def test_receipts_list_at_most_1024_chunks(tmp_path):
    content = np.random.default_rng(0).bytes(20000)
    upload = grant(Uploads(tmp_path, 10**6, 0), content=content)
    assert upload.missing(stalled=True) == tuple(range(1024))
    assert upload.missing(stalled=False) == ()
