import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edge.outbox import Outbox, OutboxError

ROOT = Path(__file__).parents[2]


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_an_update_is_kept_until_it_is_removed(tmp_path):
    box = Outbox(tmp_path)
    first = box.put("run-0-a-1", "run", "nonce", b"12345")
    second = box.put("run-1-a-1", "run", "nonce", b"67")
    again = Outbox(tmp_path)
    assert again.waiting() == [first, second]
    assert again.read(first) == b"12345"
    again.remove(first.lease)
    again.remove(first.lease)
    assert again.waiting() == [second]
    assert names(tmp_path) == ["run-1-a-1.json", "run-1-a-1.safetensors"]


@pytest.mark.parametrize(
    "harm",
    [
        lambda f: (f / "a.json").unlink(),
        lambda f: (f / "a.safetensors").unlink(),
        lambda f: (f / "a.safetensors").write_bytes(b"123"),
        lambda f: (f / "a.safetensors").write_bytes(b"54321"),
        lambda f: (f / "a.json").write_bytes(b"{"),
        lambda f: (f / "a.json").write_bytes(b"[" * 100),
        lambda f: (f / "a.json").rename(f / "c.json"),
        lambda f: (f / "a.json").rename(f / "a.json.tmp"),
    ],
)
def test_what_is_not_whole_is_swept_away(tmp_path, harm):
    box = Outbox(tmp_path)
    box.put("a", "run", "nonce", b"12345")
    kept = box.put("b", "run", "nonce", b"12345")
    harm(tmp_path)
    assert Outbox(tmp_path).waiting() == [kept]
    assert names(tmp_path) == ["b.json", "b.safetensors"]


def test_a_lease_name_is_no_path(tmp_path):
    with pytest.raises(OutboxError, match="no name for a file"):
        Outbox(tmp_path / "box").put("../../etc/x", "run", "nonce", b"1")


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutboxError):
        Outbox(tmp_path / "file" / "box")


WRITER = """
import sys
from pathlib import Path
from edge.outbox import Outbox
box = Outbox(Path(sys.argv[1]))
print("ready", flush=True)
for i in range(10**6):
    box.put(f"l{i}", "run", "nonce", bytes([i % 256]) * 300_000)
    if i >= 3:
        box.remove(f"l{i - 3}")
"""


def test_kill_9_at_any_moment_leaves_whole_updates_only(tmp_path):
    for attempt in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE
        )
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.05 + 0.037 * attempt)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        box = Outbox(tmp_path)
        waiting = box.waiting()
        for parcel in waiting:
            data = box.read(parcel)
            assert len(data) == 300_000
            assert set(data) == {int(parcel.lease[1:]) % 256}
        assert len(names(tmp_path)) == 2 * len(waiting)
