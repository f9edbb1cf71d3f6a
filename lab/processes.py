"""Start and stop the real programs. No child outlives the lab, and each may have a memory cgroup of its own."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

log = logging.getLogger(__name__)
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


class ProcessError(RuntimeError):
    """A child that could not be started or ended badly. One line, with the end of its log."""


def _die_with(parent: int) -> None:
    """In the child, before exec: SIGKILL when the lab goes, whatever ends it."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it went between fork and prctl
        os._exit(1)


@dataclass
class Child:
    """One running program."""

    name: str
    process: subprocess.Popen[str]
    log: Path
    started: float = field(default_factory=time.monotonic)

    @property
    def ended(self) -> int | None:
        """Exit status, or None while it runs."""
        return self.process.poll()

    def last_words(self) -> str:
        """Last line of its log that is not empty."""
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return ""
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def failure(self) -> str:
        """One line about how it ended."""
        code = self.ended
        if code is None:
            return f"{self.name}: running"
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        return f"{self.name}: {how}: {self.last_words()[:300]}"


class Processes:
    """The lab's children; a context manager that leaves none behind."""

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self.children: dict[str, Child] = {}
        logs.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop(*reversed(self.children))

    def start(
        self,
        name: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        talk: bool = False,
    ) -> Child:
        """Run `python -m <command>` in a process group of its own, its output in `logs/<name>.log`.

        Parameters
        ----------
        command : sequence of str
            Module and arguments.
        environment : mapping
            Added to ours.
        talk : bool
            Connect pipes to its stdin and stdout.

        Raises
        ------
        ProcessError
        """
        parent = os.getpid()
        path = self.logs / f"{name}.log"
        with open(path, "a", encoding="utf-8") as output:
            try:
                process = subprocess.Popen(
                    [sys.executable, "-m", *command],
                    stdin=subprocess.PIPE if talk else subprocess.DEVNULL,
                    stdout=subprocess.PIPE if talk else output,
                    stderr=output,
                    text=True,
                    env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
                    start_new_session=True,  # Ctrl-C reaches the lab alone, which stops them in order
                    preexec_fn=lambda: _die_with(parent),
                )
            except OSError as error:
                raise ProcessError(f"{name}: cannot be started: {error}") from error
        log.info("started %s pid=%d", name, process.pid)
        child = self.children[name] = Child(name, process, path)
        return child

    def run(
        self, name: str, command: Sequence[str], *, environment: Mapping[str, str] | None = None
    ) -> Child:
        """Start and wait; raises ProcessError when it ends with another status than 0."""
        child = self.start(name, command, environment=environment)
        if child.process.wait() != 0:
            raise ProcessError(child.failure())
        return child

    def stop(self, *names: str, patience: float = 8.0) -> None:
        """Ask the named children to end (SIGTERM), insist after `patience` seconds."""
        running = [c for n in names if (c := self.children.get(n)) and c.ended is None]
        for child in running:
            _signal(child, signal.SIGTERM)
        limit = time.monotonic() + patience
        for child in running:
            try:
                child.process.wait(max(0.05, limit - time.monotonic()))
            except subprocess.TimeoutExpired:
                log.warning("%s does not end, killed", child.name)
                _signal(child, signal.SIGKILL)
                child.process.wait()
        for child in running:
            _signal(child, signal.SIGKILL)  # whatever it left in its group
            for pipe in (child.process.stdin, child.process.stdout):
                if pipe is not None:
                    pipe.close()

    def kill(self, name: str) -> None:
        """Pull the plug: SIGKILL to the child and its group."""
        child = self.children[name]
        _signal(child, signal.SIGKILL)
        child.process.wait()


def _signal(child: Child, number: signal.Signals) -> None:
    try:
        os.killpg(child.process.pid, number)
    except (ProcessLookupError, PermissionError):
        pass
