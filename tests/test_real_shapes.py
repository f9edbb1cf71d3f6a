"""OLMoE-1B-7B at its real shapes with random weights: cut for two devices, one of them trained on within its budget.

    scripts/test --slow tests/test_real_shapes.py

Makes a checkpoint of 14 GB unless EXPERTFLEET_OLMOE names a directory that holds one.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from protocol.manifest import read_manifest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "benchmarks" / "configs" / "olmoe_1b_7b.json"
GB = 10**9


def peak_rss(*command: str) -> int:
    """Run a module to its end; the highest resident memory of its process, bytes."""
    child = subprocess.Popen([sys.executable, "-m", *command], cwd=ROOT)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0
    return usage.ru_maxrss * 1024


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    if given := os.environ.get("EXPERTFLEET_OLMOE"):
        return Path(given)
    folder = tmp_path_factory.mktemp("olmoe")
    if shutil.disk_usage(folder).free < 24 * GB:
        pytest.skip("24 GB of free disk wanted")
    made = folder / "checkpoint"
    arguments = ["--config", str(CONFIG), "--out", str(made)]
    subprocess.run(
        [sys.executable, "-m", "benchmarks.make_checkpoint", *arguments], cwd=ROOT, check=True
    )
    return made


def test_olmoe_1b_7b_is_cut_in_3_gb_and_trained_in_a_pixel(checkpoint, tmp_path):
    store = tmp_path / "store"
    command = ["export.build", "--checkpoint", str(checkpoint), "--out", str(store)]
    command += ["--formats", "int4"]
    for profile in ("pixel_8", "jetson_orin_nano"):
        used = peak_rss(*command, "--profile", profile)
        print(f"{profile}: export's peak {used / GB:.2f} GB")
        assert used < 3 * GB
    blobs = sum(f.stat().st_size for f in (store / "blobs").iterdir())
    assert blobs < 5 * GB  # the second profile added its programs only
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory_prediction", "--lease", str(store), "pixel_8"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    memory = read_manifest(store / "pixel_8" / "manifest.json").memory
    measured = json.loads(done.stdout.splitlines()[-1])["measured"]
    print(f"predicted {memory.predicted / 2**20:.0f} MB, measured {measured / 2**20:.0f} MB")
    assert measured <= memory.budget == 1024 << 20
    assert 0.95 * measured <= memory.predicted <= 1.15 * measured
