"""How fast this machine multiplies, in the runtime that trains: `python -m edge.throughput`.

Prints one JSON object: 10**9 operations per second of a packed int4 matrix [1024, 1024] with 256 tokens on all cores,
and how that was measured. `throughput.pte` is that one product, written by `export.throughput_program`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge import native

PROGRAM = Path(__file__).with_name("throughput.pte")
TOKENS, WIDTH = 256, 1024
GROUP = 32


def gflops(threads: int, seconds: float) -> float:
    """Sustained rate: whole runs of the program over the time they took.

    Raises
    ------
    NativeError
    """
    native.set_threads(threads)
    program = native.Program(PROGRAM)
    rng = np.random.default_rng(0)
    inputs: list[NDArray[Any]] = [
        rng.standard_normal((TOKENS, WIDTH), np.float32),
        rng.integers(0, 256, WIDTH * WIDTH // 2, dtype=np.uint8),
        np.full(WIDTH * WIDTH // GROUP, 0.01, np.float16),
    ]
    try:
        program.run("forward", inputs)  # the first allocates
        runs, start = 0, time.perf_counter()
        while (spent := time.perf_counter() - start) < seconds:
            program.run("forward", inputs)
            runs += 1
    finally:
        program.close()
    return 2 * TOKENS * WIDTH * WIDTH * runs / spent / 1e9


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m edge.throughput",
        description="Measure matrix throughput in the runtime that trains.",
        epilog="example: python -m edge.throughput --threads 4",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=2.0)
    args = parser.parse_args(argv)
    try:
        rate = gflops(args.threads, args.seconds)
    except native.NativeError as error:
        print(f"edge.throughput: {error}", file=sys.stderr)
        return 2
    how = f"measured, packed int4 product of {TOKENS} tokens in ExecuTorch, {args.threads} threads"
    print(json.dumps({"gflops": round(rate, 2), "how": how}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
