"""A checkpoint much larger than the memory that slicing it takes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import make_checkpoint

CONFIGS = Path(__file__).parents[2] / "benchmarks/configs"
PROGRAM = """
import sys
from pathlib import Path
from benchmarks.slice_throughput import peak_bytes
from export import families
from export.blob_store import BlobStore
from export.checkpoint import Checkpoint
from export.slice_base import slice_base

def slice_into(checkpoint, out):
    opened = Checkpoint(Path(checkpoint))
    family = families.of(opened.config, checkpoint)
    return slice_base(opened, family, BlobStore(Path(out)), lambda stage: None, jobs=2)

slice_into(sys.argv[1], sys.argv[2])  # what the libraries take
before = peak_bytes()
base = slice_into(sys.argv[3], sys.argv[4])
print(peak_bytes() - before, base.base)
"""


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
def test_slicing_takes_a_fraction_of_the_checkpoint(tiny_checkpoint, tmp_path, fused):
    config = json.loads((CONFIGS / "olmoe_1b_7b.json").read_bytes())
    config |= {"num_hidden_layers": 1, "vocab_size": 8192}
    size = make_checkpoint.make(config, tmp_path / "c", fused, 300_000_000, 0)
    assert size > 850_000_000
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    command += [str(tiny_checkpoint), str(tmp_path / "a"), str(tmp_path / "c"), str(tmp_path / "b")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    more = int(done.stdout.split()[-2])
    # Two threads, each with an expert of 12 MB and its two packed forms of together 10 MB, written as one piece.
    assert more < 200 << 20
