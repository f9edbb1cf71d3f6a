"""A device's memory: measured over the size just before a program is opened, and enforced, not only computed.

Two layers stop a process that needs more than its budget: the kernel refuses allocations (rlimit) or kills (cgroup),
and a watcher ends the process when its resident memory has been over the budget. The watcher is exact but late; the
kernel is in time but counts address space, with an allowance for thread stacks.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MIB = 1 << 20
EXIT_OVER_BUDGET = 3
EVERY = 0.02
SLACK = 64 * MIB
"""Address space that the runtimes' threads reserve and hardly touch: 41 MiB measured on two cores, 8 MiB a stack."""
_M_MMAP_THRESHOLD = -3
_NO_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|bad_alloc|MemoryAllocationFailed|error: 0x21|Cannot allocate memory",
    re.IGNORECASE,
)


class LimitError(ValueError):
    """A limit that cannot be set here."""


class OverBudgetError(MemoryError):
    """The work needs more than the budget."""


def status_bytes(key: str) -> int:
    """A field of /proc/self/status (VmRSS, VmHWM, VmData), bytes."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    raise LimitError(f"/proc/self/status has no {key}")


class MemoryLimit:
    """Measures, and when told to enforces, `budget` bytes over the process's size at the first `arm`.

    Parameters
    ----------
    enforce : "none", "rlimit" or "cgroup:PATH" (a memory cgroup, v1 or v2, that this process may join)
    """

    def __init__(self, budget: int, enforce: str = "none") -> None:
        if enforce not in ("none", "rlimit") and not enforce.startswith("cgroup:/"):
            raise LimitError(f"--enforce {enforce}: none, rlimit or cgroup:/PATH wanted")
        if budget < 1:
            raise LimitError(f"a budget of {budget} bytes")
        self.budget, self.enforce, self.baseline = budget, enforce, 0
        self._peak, self._stop = 0, threading.Event()

    def arm(self) -> None:
        """Start a measurement. The first one also sets the baseline: call it just before a program is opened, with
        every library imported, so that what earlier leases left behind counts as ours.
        """
        gc.collect()
        _return_freed_memory()
        _reset_high_water()
        self._peak = 0
        if self.baseline:
            return
        self.baseline = status_bytes("VmRSS")
        if self.enforce == "rlimit":
            limit = status_bytes("VmData") + self.budget + SLACK
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        elif self.enforce != "none":
            _join_cgroup(Path(self.enforce.removeprefix("cgroup:")), self.budget)
        if self.enforce != "none":
            threading.Thread(target=self._watch, name="memory", daemon=True).start()

    def peak(self) -> int:
        """Highest resident bytes since `arm`, less the baseline."""
        self._peak = max(self._peak, status_bytes("VmHWM") - self.baseline)
        return max(0, self._peak)

    def message(self, needed: str) -> str:
        """The one line about a budget that was not enough."""
        return (
            f"memory: {needed} over the baseline of {self.baseline / MIB:.1f} MiB, "
            f"the budget is {self.budget / MIB:.1f} MiB"
        )

    def _watch(self) -> None:
        while not self._stop.wait(EVERY):
            if self.peak() > self.budget:
                line = self.message(f"{self.peak() / MIB:.1f} MiB") + ": stopped\n"
                os.write(2, line.encode())
                # At once, from whatever thread: files are only ever renamed into place, so none is left half-written.
                os._exit(EXIT_OVER_BUDGET)

    def close(self) -> None:
        """Stop watching."""
        self._stop.set()

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn every way in which a refused allocation shows itself into `OverBudgetError`."""
        try:
            yield
        except OverBudgetError:
            raise
        except MemoryError as error:
            raise OverBudgetError(self.message("more is needed")) from error
        except RuntimeError as error:
            if self.enforce != "none" and _NO_MEMORY.search(str(error)):
                raise OverBudgetError(self.message("more is needed")) from error
            raise


def _return_freed_memory() -> None:
    """Have glibc give large blocks back when they are freed. By itself it raises its threshold with every such block,
    and the next program then lies beside the holes of the last: 7 MiB of 67 measured in the second lease.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, MIB)
        libc.malloc_trim(0)
    except (OSError, AttributeError):
        pass  # another C library


def _reset_high_water() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        pass  # the peak is then the process's, which is never less


def _join_cgroup(path: Path, budget: int) -> None:
    try:
        (path / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")
        v2 = (path / "memory.max").exists()
        used = path / ("memory.current" if v2 else "memory.usage_in_bytes")
        limit = int(used.read_text(encoding="ascii")) + budget
        cap = path / ("memory.max" if v2 else "memory.limit_in_bytes")
        cap.write_text(str(limit), encoding="ascii")
    except (OSError, ValueError) as error:
        raise LimitError(f"--enforce cgroup:{path}: {error}") from error
