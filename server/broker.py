"""`--broker auto`: a broker of our own on a free loopback port, that dies with us and is started again when it dies.

Mosquitto when it is installed, else amqtt in its own process (for trials only: no MQTT 5, no queue limits).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from server.adapters import write_atomically
from server.mqtt import BrokerError

log = logging.getLogger(__name__)
HOST = "127.0.0.1"
READY_SECONDS = 10.0
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None

_CONF = """listener {port} {host}
allow_anonymous true
max_packet_size 262144
max_inflight_messages 20
max_queued_messages 10000
max_queued_bytes 268435456
memory_limit 536870912
persistence true
persistence_location {folder}/
autosave_interval 5
log_dest stderr
log_type error
"""


def free_port(wanted: int = 0) -> int:
    """`wanted` when it can be bound on loopback, else any free port."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise BrokerError("no free loopback port")


def find_mosquitto() -> str | None:
    """Path of Mosquitto; Debian installs it where a user's PATH does not look."""
    return shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")


def _mosquitto(port: int, folder: Path) -> list[str]:
    program = find_mosquitto()
    if program is None:
        raise BrokerError("Mosquitto is not installed")
    conf = _CONF.format(port=port, host=HOST, folder=folder)
    if os.geteuid() == 0:
        # As root it would change its user, which clears the signal that ends it when we die.
        conf += "user root\n"
    write_atomically(folder / "mosquitto.conf", conf.encode())
    return [program, "-c", str(folder / "mosquitto.conf")]


def _amqtt(port: int, folder: Path) -> list[str]:
    return [sys.executable, "-m", "server.amqtt_process", HOST, str(port)]


KINDS: dict[str, Callable[[int, Path], list[str]]] = {"mosquitto": _mosquitto, "amqtt": _amqtt}


def _die_with(parent: int) -> Callable[[], None]:
    def before_exec() -> None:
        os.setpgrp()  # Ctrl-C ends the server first, which then ends the broker
        if _LIBC is not None:
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)

    return before_exec


def _start(command: list[str], log_file: Path) -> subprocess.Popen[bytes]:
    # Popen and not asyncio's: the death signal is tied to the thread that forks, which must be the main thread.
    with open(log_file, "wb") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            preexec_fn=_die_with(os.getpid()),
        )


def _last_line(log_file: Path) -> str:
    lines = log_file.read_text(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else f"see {log_file}"


async def _listening(process: subprocess.Popen[bytes], port: int, log_file: Path) -> None:
    for _ in range(int(READY_SECONDS / 0.02)):
        if process.poll() is not None:
            code, said = process.returncode, _last_line(log_file)
            raise BrokerError(f"the broker ended with code {code}: {said}")
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection(HOST, port)
            writer.close()
            return
        await asyncio.sleep(0.02)
    raise BrokerError(f"the broker does not listen on port {port} after {READY_SECONDS:.0f} s")


async def _supervise(
    command: list[str], log_file: Path, process: subprocess.Popen[bytes], port: int
) -> None:
    """Restart the broker whenever it dies; end it when cancelled."""
    try:
        while True:
            await asyncio.sleep(0.2)
            if process.poll() is None:
                continue
            log.warning("the broker died with code %s, starting it again", process.returncode)
            process = _start(command, log_file)
            try:
                await _listening(process, port, log_file)
            except BrokerError as error:
                log.warning("%s", error)
                await asyncio.sleep(1.0)
    finally:
        process.terminate()
        try:
            process.wait(2)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _command(kind: str, folder: Path, port: int) -> tuple[str, list[str]]:
    if kind == "auto":
        kind = "mosquitto" if find_mosquitto() else "amqtt"
    folder.mkdir(parents=True, exist_ok=True)
    return kind, KINDS[kind](port, folder.resolve())


@contextlib.asynccontextmanager
async def broker(kind: str, folder: Path, port: int) -> AsyncIterator[None]:
    """Run a broker of our own on loopback `port` while the context is open.

    Parameters
    ----------
    kind : str
        "auto" or a key of KINDS.
    folder : Path
        For its configuration and queue.

    Raises
    ------
    BrokerError
        When it cannot be started.
    """
    kind, command = _command(kind, folder, port)
    log_file = folder / "broker.log"
    process = _start(command, log_file)
    try:
        await _listening(process, port, log_file)
    except BrokerError:
        process.kill()
        process.wait()
        raise
    log.info("%s on %s:%d pid=%d", kind, HOST, port, process.pid)
    task = asyncio.create_task(_supervise(command, log_file, process, port), name="broker")
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
