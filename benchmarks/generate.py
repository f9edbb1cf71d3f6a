"""Tokens per second and memory of generating, runtime beside runtime over one artifact.

    python -m export.build --profile jetson_orin --out store
    python -m export.inference --store store --profile jetson_orin
    OMP_NUM_THREADS=1 python -m benchmarks.generate --artifact store/jetson_orin [--adapter DIR]

Every repeat reads a prompt and then decodes token by token, the runtimes in turn, in one process. Ratios are taken
repeat by repeat. Memory is the peak of a process of its own, over what the imported libraries take. transformers
computes the same weights in float32.
"""

from __future__ import annotations

import argparse
import importlib
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edge.decode import RUNTIMES, Decoder, open_decoder
from edge.generate import open_artifact


def once(decoder: Decoder, prompt: Sequence[int], count: int) -> tuple[float, float]:
    """Prompt tokens and generated tokens per second."""
    decoder.restart()
    start = time.perf_counter()
    logits = decoder.read(prompt)
    read = time.perf_counter()
    for _ in range(count):
        logits = decoder.read([int(logits.argmax())])
    end = time.perf_counter()
    return len(prompt) / (read - start), count / (end - read)


def _resident() -> int:
    """Bytes of memory that this process has now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def peak(args: argparse.Namespace, runtime: str, prompt: Sequence[int]) -> int:
    """Bytes that opening and generating add to a process."""
    importlib.import_module(RUNTIMES[runtime])
    before = _resident()
    decoder = open_decoder(runtime, open_artifact(args.artifact, args.adapter), args.threads)
    once(decoder, prompt, args.tokens)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.generate", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runtime", action="append", choices=sorted(RUNTIMES))
    parser.add_argument("--memory-of", choices=sorted(RUNTIMES), help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; prints a table."""
    args = _parser().parse_args(argv)
    opened = open_artifact(args.artifact, args.adapter)
    rng = np.random.default_rng(0)
    prompt = rng.integers(2, opened.artifact.base.vocabulary, args.prompt_tokens).tolist()
    if args.memory_of:
        print(json.dumps(peak(args, args.memory_of, prompt)))
        return 0
    runtimes = args.runtime or sorted(RUNTIMES)
    memory = {}
    for runtime in runtimes:
        command = [sys.executable, "-m", "benchmarks.generate", "--memory-of", runtime]
        given = list(sys.argv[1:] if argv is None else argv)
        done = subprocess.run([*command, *given], stdout=subprocess.PIPE, check=True)
        memory[runtime] = json.loads(done.stdout)
    decoders = {runtime: open_decoder(runtime, opened, args.threads) for runtime in runtimes}
    found: dict[str, list[tuple[float, float]]] = {runtime: [] for runtime in runtimes}
    for repeat in range(args.repeats + 1):
        for runtime, decoder in decoders.items():
            speed = once(decoder, prompt, args.tokens)
            if repeat:  # the first warms up
                found[runtime].append(speed)
    first = runtimes[0]
    print(f"{'runtime':14}{'prompt tok/s':>14}{'ratio':>8}{'tok/s':>10}{'ratio':>8}{'peak MB':>10}")
    for runtime in runtimes:
        cells = []
        for part in (0, 1):
            cells.append(statistics.median(speed[part] for speed in found[runtime]))
            pairs = zip(found[runtime], found[first], strict=True)
            cells.append(statistics.median(mine[part] / other[part] for mine, other in pairs))
        print(
            f"{runtime:14}{cells[0]:14.0f}{cells[1]:8.2f}{cells[2]:10.1f}{cells[3]:8.2f}"
            f"{memory[runtime] / 1e6:10.1f}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
