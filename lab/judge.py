"""The lab's own judgement of every global adapter, in a process apart: see `lab.evaluate`."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from lab.processes import Child, ProcessError, Processes

BASE = "-"


class Judge:
    """Asks for scores as adapters appear; `scores` grows as they arrive."""

    def __init__(self, processes: Processes, flags: Sequence[str], adapters: Path) -> None:
        self.adapters = adapters
        self.scores: dict[int, float] = {}
        self._asked: dict[str, int] = {}
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._child: Child = processes.start(
            "judge",
            ["lab.evaluate", *flags],
            environment={"OMP_NUM_THREADS": "1"},
            talk=True,
        )
        threading.Thread(target=self._listen, name="judge", daemon=True).start()
        self._ask(BASE, 0)

    def _listen(self) -> None:
        assert self._child.process.stdout is not None
        for line in self._child.process.stdout:
            self._answers.put(line)

    def _ask(self, name: str, version: int) -> None:
        self._asked[name] = version
        assert self._child.process.stdin is not None
        try:
            self._child.process.stdin.write(f"{name}\n")
            self._child.process.stdin.flush()
        except (BrokenPipeError, ValueError) as error:
            raise ProcessError(self._child.failure()) from error

    def look(self) -> None:
        """Ask about adapters that are new, take in what has been answered; raises ProcessError."""
        for folder in sorted(self.adapters.glob("[0-9]*")):
            if not folder.name.isdecimal() or folder.name == "0" or str(folder) in self._asked:
                continue
            if (folder / "adapter_config.json").exists() and (
                folder / "adapter_model.safetensors"
            ).exists():
                self._ask(str(folder), int(folder.name))
        while not self._answers.empty():
            answer = json.loads(self._answers.get())
            self.scores[self._asked[answer["adapter"]]] = answer["accuracy"]
        if self._child.ended and len(self.scores) < len(self._asked):
            raise ProcessError(self._child.failure())

    def finish(self, patience: float = 120.0) -> dict[int, float]:
        """Wait for the scores of every adapter there is."""
        limit = time.monotonic() + patience
        self.look()
        while len(self.scores) < len(self._asked):
            if time.monotonic() > limit:
                raise ProcessError(f"judge: no answer in {patience:.0f} s")
            time.sleep(0.1)
            self.look()
        return dict(self.scores)
