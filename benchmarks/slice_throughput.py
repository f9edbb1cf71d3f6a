"""Slicing a whole checkpoint: speed, memory, re-use.

    python -m benchmarks.slice_throughput --checkpoint DIR --out STORE

Compared with what torch takes to copy the same bytes once, in memory, in the same run and with one thread. `--out` must
not exist; it is left behind for inspection.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from export import families
from export.blob_store import BlobStore
from export.checkpoint import Checkpoint
from export.slice_base import FORMATS, slice_base


def copy(checkpoint: Checkpoint) -> tuple[int, float, float]:
    """Bytes of all tensors, seconds to read them from disk, seconds of torch to copy what was read."""
    size, reading, copying = 0, 0.0, 0.0
    for name in checkpoint.names():
        start = time.perf_counter()
        value = checkpoint.raw(name)
        read = time.perf_counter()
        into = torch.empty_like(value)
        into.zero_()  # memory that has been touched, as in a copy that is made again and again
        ready = time.perf_counter()
        into.copy_(value)
        copying += time.perf_counter() - ready
        reading += read - start
        size += value.nbytes
    return size, reading, copying


def peak_bytes() -> int:
    """The most memory that this process has had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--formats", default=",".join(FORMATS))
    args = parser.parse_args(argv)
    if args.out.exists():
        print(f"slice_throughput: {args.out} exists", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    checkpoint = Checkpoint(args.checkpoint)
    family = families.of(checkpoint.config, str(args.checkpoint))
    formats = tuple(args.formats.split(","))
    size, reading, copying = copy(checkpoint)
    print(f"checkpoint: {size / 1e9:.2f} GB", flush=True)
    print(
        f"torch's copy of it: {copying:.1f} s, {size / copying / 1e9:.2f} GB/s; reading it: {reading:.1f} s"
    )
    written = 0.0
    for what in ("slicing", "again"):
        store = BlobStore(args.out)
        start = time.perf_counter()
        base = slice_base(checkpoint, family, store, lambda stage: None, formats, args.jobs)
        seconds = time.perf_counter() - start
        written = store.new_bytes / 1e9
        print(
            f"{what}, {','.join(formats)}, {args.jobs} jobs: {seconds:.1f} s, "
            f"{size / seconds / 1e9:.2f} GB/s read, {written:.2f} GB written, "
            f"{seconds / copying:.1f} times torch's copy",
            flush=True,
        )
    os.sync()
    print(f"relative error: {base.error}")
    print(f"peak memory of the process: {peak_bytes() / 2**30:.2f} GiB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
