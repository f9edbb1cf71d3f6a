import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest

from export import blob_store
from export.blob_store import BlobStore, OtherBlob, Part, write_atomically
from export.tensor_file import TensorFile
from protocol import tensors


@pytest.fixture(params=["nameless", "named"])
def kind(request, monkeypatch):
    """Both ways to write a file that is whole or not there."""
    if request.param == "named":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    return request.param


def test_a_blob_is_named_by_its_content_and_written_once(tmp_path, kind):
    store = BlobStore(tmp_path)
    blob = store.put(b"abc")
    assert blob.sha256 == hashlib.sha256(b"abc").hexdigest()
    assert store.get(blob) == b"abc"
    assert store.put(b"abc") == blob
    assert store.new_bytes == 3
    assert os.listdir(store.folder) == [blob.sha256]


def test_a_blob_of_the_wrong_size_is_written_again(tmp_path, kind):
    store = BlobStore(tmp_path)
    blob = store.put(b"abc")
    (store.folder / blob.sha256).write_bytes(b"a")
    assert blob not in store
    store.put(b"abc")
    assert store.get(blob) == b"abc"
    assert os.listdir(store.folder) == [blob.sha256]


def test_a_file_is_replaced_whole(tmp_path, kind):
    path = tmp_path / "deep" / "file"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert path.stat().st_mode & 0o777 == 0o644
    assert os.listdir(path.parent) == ["file"]


def test_a_failed_write_leaves_nothing(tmp_path, kind, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(blob_store.os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        BlobStore(tmp_path).put(b"abc")
    assert os.listdir(tmp_path / "blobs") == []


def test_a_killed_process_leaves_nothing_half_written(tmp_path):
    program = (
        "import os, signal, sys; from pathlib import Path; from export.blob_store import Part\n"
        "part = Part(Path(sys.argv[1])); part.write(b'half', 0); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert done.returncode == -9
    assert os.listdir(tmp_path) == []


def test_a_closed_store_takes_only_its_own_blobs(tmp_path):
    mine = BlobStore(tmp_path).put(b"mine")
    closed = BlobStore(tmp_path, only={mine.sha256})
    assert closed.put(b"mine") == mine
    with pytest.raises(OtherBlob, match="does not belong there"):
        closed.put(b"other")
    part = Part(closed.folder)
    part.write(b"other", 0)
    with pytest.raises(OtherBlob):
        closed.put_part(part)
    part.close()
    assert os.listdir(closed.folder) == [mine.sha256]


def test_a_file_written_in_pieces_has_the_bytes_of_encode(tmp_path):
    rng = np.random.default_rng(0)
    named = {
        "b.packed": rng.integers(0, 256, (7, 16), dtype=np.uint8),
        "b.scale": rng.normal(size=(7, 1)).astype(np.float16),
        "a ü": rng.normal(size=(5,)).astype(np.float32),
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 3), np.float32),
    }
    specs = {name: (value.shape, value.dtype.name) for name, value in named.items()}
    file = TensorFile(BlobStore(tmp_path), specs)
    file.write("b.packed", named["b.packed"][4:], 4)
    for name in ("scalar", "a ü", "b.scale", "empty"):
        file.write(name, named[name])
    file.write("b.packed", named["b.packed"][:4])
    blob = file.finish()
    file.close()
    assert BlobStore(tmp_path).get(blob) == tensors.encode(named)


def test_a_file_is_not_finished_before_everything_is_written(tmp_path):
    file = TensorFile(BlobStore(tmp_path), {"a": ((2, 3), "float32")})
    file.write("a", np.zeros((1, 3), np.float32))
    with pytest.raises(AssertionError, match="'a'"):
        file.finish()
    file.close()
    assert os.listdir(tmp_path / "blobs") == []
