"""Memory limits in processes of their own: over the budget means one line, an exit code, nothing half-written."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edge.limits import EXIT_OVER_BUDGET, MIB, LimitError, MemoryLimit, OverBudgetError

ROOT = Path(__file__).parents[2]
HUNGRY = """
import sys, time
from pathlib import Path
import numpy as np
from edge.limits import MIB, MemoryLimit, OverBudgetError
from edge.outbox import Outbox
kind, enforce, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
limit = MemoryLimit(32 * MIB, enforce)
limit.arm()
box = Outbox(folder)
held = []
try:
    with limit.explained():
        for i in range(400):
            if kind == "numpy":
                held.append(np.ones(MIB // 8))
            elif kind == "large":
                held.append(np.ones(64 * MIB))
            elif kind == "torch":
                import torch
                held.append(torch.ones(64 * MIB))
            box.put(f"l{i}", "run", "nonce", b"x" * 50_000)
            time.sleep(0.001)
except OverBudgetError as error:
    print(f"edge: {error}", file=sys.stderr)
    sys.exit(3)
print("ended", len(held))
"""


def hungry(kind, enforce, folder):
    return subprocess.run(
        [sys.executable, "-c", HUNGRY, kind, enforce, str(folder)],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["numpy", "large"])
def test_a_process_over_its_budget_is_stopped(tmp_path, kind):
    done = hungry(kind, "rlimit", tmp_path)
    assert done.returncode == EXIT_OVER_BUDGET
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert "the budget is 32.0 MiB" in lines[0]
    from edge.outbox import Outbox

    before = sorted(p.name for p in tmp_path.iterdir() if p.suffix == ".json")
    box = Outbox(tmp_path)
    assert sorted(f"{p.lease}.json" for p in box.waiting()) == before


def test_without_enforcement_it_is_only_measured(tmp_path):
    done = hungry("numpy", "none", tmp_path)
    assert done.returncode == 0
    assert done.stdout == "ended 400\n"


def test_the_peak_is_what_was_held():
    limit = MemoryLimit(1 << 40)
    limit.arm()
    import numpy as np

    held = np.ones(8 * MIB)
    assert 60 * MIB < limit.peak() < 80 * MIB
    del held
    assert limit.peak() > 60 * MIB
    baseline = limit.baseline
    limit.arm()
    assert limit.baseline == baseline
    assert limit.peak() < 60 * MIB


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("x"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_refused_allocations_are_explained(error):
    limit = MemoryLimit(MIB, "rlimit")
    with pytest.raises(OverBudgetError, match=r"the budget is 1.0 MiB"), limit.explained():
        raise error
    with pytest.raises(RuntimeError, match="shape"), limit.explained():
        raise RuntimeError("shape mismatch")


def test_limits_that_cannot_be_set(tmp_path):
    with pytest.raises(LimitError, match="none, rlimit or cgroup"):
        MemoryLimit(1, "ulimit")
    with pytest.raises(LimitError, match="a budget of 0"):
        MemoryLimit(0)
    with pytest.raises(LimitError, match="cgroup"):
        MemoryLimit(MIB, f"cgroup:{tmp_path}").arm()


def test_a_cgroup_is_joined_and_enforced(tmp_path):
    group = Path("/sys/fs/cgroup/memory")
    if not group.exists():
        group = Path("/sys/fs/cgroup")
    group /= f"expertfleet-test-{os.getpid()}"
    try:
        group.mkdir()
        if not any((group / n).exists() for n in ("memory.max", "memory.limit_in_bytes")):
            pytest.skip("no memory controller")
    except OSError as error:
        pytest.skip(f"no cgroup of our own: {error}")
    try:
        done = hungry("numpy", f"cgroup:{group}", tmp_path)
        # Whoever is first: the watcher with its line, or the kernel.
        assert done.returncode in (EXIT_OVER_BUDGET, -9)
        assert done.stdout == ""
    finally:
        for _ in range(50):
            try:
                group.rmdir()
                break
            except OSError:
                time.sleep(0.1)


def test_what_numpy_loads_late_is_there_before_the_baseline():
    code = "import edge.run, sys; sys.exit('numpy.random' not in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
