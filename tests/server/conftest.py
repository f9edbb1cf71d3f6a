import contextlib
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.server import tiny_store
from tests.server.fake_device import FakeDevice
from tests.server.tiny_store import FROZEN, FULL, HALF, WIDE

PROFILES = {
    "small": ((FULL, HALF), (FULL, FULL)),
    "large": ((WIDE, FULL, FROZEN), (WIDE, WIDE, HALF, FROZEN)),
}


class Server:
    """A real server process."""

    def __init__(self, store: Path, state: Path, base, *flags: str):
        self.base, self.state = base, state
        self.command = [
            sys.executable, "-m", "server", "--store", str(store), "--state", str(state), "--port", "0",
            "--steps", "10", *flags,
        ]  # fmt: skip
        self.lines: list[str] = []
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            self.command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        line = self.process.stdout.readline()
        found = re.match(r"listening on (\S+) broker (\S+)", line)
        if found is None:
            raise AssertionError(line + self.process.stderr.read())
        self.url, self.broker = found[1], found[2]
        self._reader = threading.Thread(target=self._read, args=(self.process.stderr,), daemon=True)
        self._reader.start()

    def _read(self, stream) -> None:
        for line in stream:
            self.lines.append(line.rstrip())

    def device(self, name: str, profile: str = "small", **more) -> FakeDevice:
        shape = tiny_store.shape(PROFILES[profile]) if profile in PROFILES else None
        return FakeDevice(self.url, name, profile, self.base, shape, **more)

    def wait_line(self, pattern: str, seconds: float = 60.0) -> str:
        """The first line of the log that matches."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for line in list(self.lines):
                if re.search(pattern, line):
                    return line
            time.sleep(0.05)
        raise AssertionError(f"no line {pattern!r} in:\n" + "\n".join(self.lines))

    def kill(self) -> None:
        self.process.kill()
        self._reap()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self._reap()

    def _reap(self) -> None:
        self.process.wait(60)
        self._reader.join(60)
        self.process.stdout.close()
        self.process.stderr.close()


@pytest.fixture
def store(tmp_path):
    return tmp_path / "store", tiny_store.build(tmp_path / "store", PROFILES)


@pytest.fixture
def serve(tmp_path, store):
    """Start a server with more flags; everything is stopped at the end."""
    servers = []

    def start(*flags: str) -> Server:
        servers.append(Server(store[0], tmp_path / "state", store[1], *flags))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()
        print("\n".join(server.lines))


@pytest.fixture
def fleet():
    """Register devices here so that they are disconnected at the end."""
    with contextlib.ExitStack() as stack:

        def add(device: FakeDevice) -> FakeDevice:
            stack.callback(device.vanish)
            return device.start()

        yield add
