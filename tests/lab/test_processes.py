import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lab.cgroups import _own, memory_groups
from lab.processes import ProcessError, Processes

ROOT = Path(__file__).parents[2]
SLEEPER = "import time; print('up', flush=True); time.sleep(60)"


def module(folder, name, text):
    (folder / f"{name}.py").write_text(text)
    return {"PYTHONPATH": str(folder)}


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds=5.0):
    limit = time.monotonic() + seconds
    while not condition() and time.monotonic() < limit:
        time.sleep(0.02)
    assert condition()


def test_children_end_with_the_context(tmp_path):
    with Processes(tmp_path / "logs") as processes:
        child = processes.start("s", ["sleeper"], environment=module(tmp_path, "sleeper", SLEEPER))
        wait_until(lambda: "up" in child.log.read_text())
        assert child.ended is None
    assert child.ended == -15


def test_a_child_that_ignores_sigterm_is_killed_with_its_own_children(tmp_path):
    text = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(p.pid, flush=True)\ntime.sleep(60)\n"
    )
    with Processes(tmp_path / "logs") as processes:
        child = processes.start("s", ["stubborn"], environment=module(tmp_path, "stubborn", text))
        wait_until(lambda: child.log.read_text().strip().isdigit())
        grandchild = int(child.log.read_text())
        processes.stop("s", patience=0.2)
        assert child.ended == -9
    wait_until(lambda: not alive(grandchild))


def test_no_child_outlives_a_lab_that_is_killed(tmp_path):
    environment = {**os.environ, **module(tmp_path, "sleeper", SLEEPER)}
    environment["PYTHONPATH"] += os.pathsep + str(ROOT)
    lab = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import time; from pathlib import Path; from lab.processes import Processes\n"
            f"c = Processes(Path({str(tmp_path)!r})).start('s', ['sleeper'])\n"
            "print(c.process.pid, flush=True); time.sleep(60)",
        ],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert lab.stdout is not None
    child = int(lab.stdout.readline())
    assert alive(child)
    lab.kill()
    lab.wait()
    lab.stdout.close()
    wait_until(lambda: not alive(child))


def test_failure_is_one_line_with_the_last_words(tmp_path):
    environment = module(tmp_path, "broken", "import sys; print('bad luck'); sys.exit(3)")
    with Processes(tmp_path / "logs") as processes, pytest.raises(ProcessError) as caught:
        processes.run("b", ["broken"], environment=environment)
    assert str(caught.value) == "b: exit status 3: bad luck"


def test_cgroup_folders_of_both_versions():
    v1 = "35 31 0:32 / /cg/memory rw - cgroup cgroup rw,memory"
    assert _own(v1, "4:memory:/a/b\n1:cpu:/") == (Path("/cg/memory/a/b"), 1)
    v2 = "30 23 0:26 / /cg rw - cgroup2 cgroup2 rw"
    assert _own(f"{v2}\n{v1}", "4:memory:/a\n0::/c") == (Path("/cg/memory/a"), 1)
    assert _own(v2, "0::/c") == (Path("/cg/c"), 2)
    # a container sees its own group as the root of the mount
    assert _own(v1.replace(" / /", " /a/b /"), "4:memory:/a/b") == (Path("/cg/memory"), 1)
    assert _own("", "") is None


def test_memory_group_kills_what_is_too_large_and_is_removed(tmp_path):
    with memory_groups(["d1"]) as groups:
        if not groups:
            pytest.skip("no memory cgroups may be made here")
        folder = groups["d1"]
        v2 = (folder / "memory.max").exists()
        (folder / ("memory.max" if v2 else "memory.limit_in_bytes")).write_text(str(64 << 20))
        code = f"open('{folder}/cgroup.procs', 'w').write('0'); x = bytearray(256 << 20)"
        done = subprocess.run([sys.executable, "-c", code], check=False)
        assert done.returncode == -9
    assert not folder.exists()
    assert not folder.parent.exists()


def test_groups_of_a_killed_lab_are_swept(tmp_path):
    code = (
        "import os, signal; from lab.cgroups import memory_groups\n"
        "with memory_groups(['d1']) as groups:\n"
        "    print(*groups.values(), flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == -9
    if not done.stdout.strip():
        pytest.skip("no memory cgroups may be made here")
    left = Path(done.stdout.strip())
    assert left.exists()
    with memory_groups(["d2"]) as groups:
        assert groups["d2"].exists()
    assert not left.parent.exists()
