"""The whole reference base profiled on the smallest device of the demo: peak memory, time, and what is measured.

    python -m benchmarks.profiling --data AGNEWS/train.jsonl.gz --work DIR

The artifact is the demo's for `phone_4gb`: its budget scaled to 29.1 MB, so that it holds a part of the experts only. A
fresh process profiles rows of AG News under a limit of that budget (the kernel refuses what is beyond). Experts come
over HTTP, one at a time, and are dropped after use. Beside it, another process evaluates the resident sub-MoE on the
same rows, which is what a device does without this. The statistics are compared with a forward pass of transformers on
the same rows and weights. Ends with 1 when memory or a statistic is out of bounds, with 0 and a reason without the
data.
"""

from __future__ import annotations

import argparse
import http.server
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

MB = 2**20
PROFILE, SCALE = "phone_4gb", 0.0597  # lab/scenarios/demo.toml
LABELS = ("World", "Sports", "Business", "Sci/Tech")
TOLERANCE = 1e-4


def build(work: Path) -> Path:
    """The store with the one artifact."""
    from export.build import main

    store = work / "store"
    shape = ["--rank", "4", "--sequence", "128", "--batch", "4", "--answers", "2"]
    budget = ["--profile", PROFILE, "--scale-budget", str(SCALE)]
    if main(["--out", str(store), *budget, *shape]):
        raise SystemExit(2)
    return store


def opened(store: Path, data: Path, count: int) -> tuple[Any, Any, list[Any]]:
    """(artifact, prompter, rows) of a device."""
    from edge import data as text
    from edge.run import read_tokenizer
    from edge.session import Artifact
    from protocol import manifest
    from protocol.messages import Task

    base = manifest.read_base(store / "base.json")
    held = manifest.read_manifest(store / PROFILE / "manifest.json")
    artifact = Artifact(base, held, store / "blobs")
    shape = held.shape
    prompts = text.prompter(
        read_tokenizer(artifact.path(held.tokenizer)),
        Task(labels=LABELS),
        *(shape.batch, shape.sequence, shape.answers, base),
    )
    rows = text.read_rows(data, "text", "label_name")
    rows = text.first_by_hash(rows, count)
    for row in rows:  # the tokenizer's memory of words belongs to the process
        prompts.row(row, None)
    return artifact, prompts, rows


def measure(store: Path, data: Path, count: int, kind: str, url: str, out: Path) -> None:
    """In a process of its own: profile or evaluate under the budget; prints peak, seconds and bytes."""
    from edge import data as text
    from edge import limits, profiling, slots, trainer
    from edge.fetch import BlobCache, Server
    from edge.session import load_backend

    artifact, prompts, rows = opened(store, data, count)
    base, held = artifact.base, artifact.manifest
    backend = load_backend("executorch")
    resident = slots.resident_of(held.experts, base.moe_layers, held.shape.slots, base.num_experts)
    shapes = slots.adapter_shapes(base, held.shape, resident)
    adapter = {name: np.zeros(size, np.float32) for name, size in shapes.items()}
    batches = text.evaluation_batches(prompts, rows)
    limit = limits.MemoryLimit(held.memory.budget, "rlimit")
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        cache = BlobCache(Server(url), Path(folder) / "blobs")
        limit.arm()
        started, worked = time.monotonic(), time.process_time()
        with limit.explained():
            if kind == "full":
                found = profiling.profile(
                    artifact, cache.borrow, batches, Path(folder), labels=len(LABELS)
                )
                np.savez(out, tokens=found.tokens, **found.stats)
            else:
                reader = backend.open_evaluate(artifact, resident)
                sums = trainer.RoutingSums(base.moe_layers, base.num_experts, resident)
                trainer.evaluate(reader, adapter, batches, None, lambda: None, sums)
                np.savez(out, tokens=sums.tokens, **sums.arrays())
                reader.close()
        seconds, cpu = time.monotonic() - started, time.process_time() - worked
        left = sum(path.stat().st_size for path in cache.folder.iterdir())
    facts = {"peak": limit.peak(), "seconds": seconds, "cpu": cpu, "left": left}
    print(json.dumps(facts | {"down": cache.bytes_down}))


def serve(store: Path) -> tuple[http.server.ThreadingHTTPServer, str]:
    """The blobs of a store over HTTP, as a server has them."""

    class Blobs(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = store / "blobs" / self.path.rpartition("/")[2]
            data = path.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            return

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Blobs)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_address[1]}"


def largest_difference(store: Path, data: Path, count: int, found: Any) -> dict[str, float]:
    """The largest difference of a statistic, per token, between a profile and transformers' own forward pass."""
    import torch
    from transformers import AutoModelForCausalLM

    from edge import data as text
    from export import families
    from reference_base import MODEL_DIR
    from tests.export.families import reference, whole

    artifact, prompts, rows = opened(store, data, count)
    base, shape = artifact.base, artifact.manifest.shape
    model = AutoModelForCausalLM.from_pretrained(
        MODEL_DIR, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    family = families.of(base.config, "reference base")
    reference.round_weights(model, family, base.moe_layers, shape.dense, {})
    wanted = whole.statistics(model, base, text.evaluation_batches(prompts, rows))
    tokens = float(found["tokens"])
    return {n: float(np.abs(found[n] - v).max()) / tokens for n, v in wanted.items()}


def child(store: Path, data: Path, count: int, kind: str, url: str, out: Path) -> dict[str, Any]:
    """Run `measure` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.profiling", "--data", str(data), "--measure"]
    command += [str(store), str(count), kind, url, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise SystemExit(f"{kind}, {count} rows: the process ended with {done.returncode}: {said}")
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="AG News, JSON lines")
    parser.add_argument("--work", type=Path, default=Path(".demo/profiling"))
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        store, count, kind, url, out = args.measure
        measure(Path(store), args.data, int(count), kind, url, Path(out))
        return 0
    if not args.data.is_file():
        print(f"skipped: no AG News at {args.data}")
        return 0
    from export.profile_programs import predicted
    from protocol import manifest

    args.work.mkdir(parents=True, exist_ok=True)
    store = build(args.work)
    base = manifest.read_base(store / "base.json")
    held = manifest.read_manifest(store / PROFILE / "manifest.json")
    if held.profiling is None:
        print("the artifact has no programs that profile the whole model")
        return 1
    parts = predicted(held.profiling, held.shape, base)
    total, budget = sum(parts.values()), held.memory.budget
    resident = sum(map(len, held.shape.slots))
    print(
        f"{PROFILE}: {resident} of {base.num_experts * len(base.moe_layers)} experts resident, "
        f"{held.shape.batch} x {held.shape.sequence} tokens, budget {budget / MB:.1f} MB"
    )
    said = ", ".join(f"{name} {size / MB:.2f}" for name, size in parts.items())
    print(f"predicted for a full profile: {total / MB:.1f} MB ({said})")
    server, url = serve(store)
    fine = True
    print("rows  tokens  what          peak MB     s  CPU s  rows/CPU s  MB down  MB left")
    for count in args.rows:
        for kind in ("resident", "full"):
            out = args.work / f"{kind}-{count}.npz"
            facts = child(store, args.data, count, kind, url, out)
            found = np.load(out)
            print(
                f"{count:4d} {int(found['tokens']):7d}  {kind:10s} {facts['peak'] / MB:10.1f} "
                f"{facts['seconds']:5.1f} {facts['cpu']:6.1f} {count / facts['cpu']:11.1f} {facts['down'] / MB:8.2f} "
                f"{facts['left'] / MB:8.2f}",
                flush=True,
            )
            fine &= facts["peak"] <= budget and (kind != "full" or facts["peak"] <= 1.05 * total)
    found = np.load(args.work / f"full-{min(args.rows)}.npz")
    off = largest_difference(store, args.data, min(args.rows), found)
    print(
        f"largest difference to transformers per token, {min(args.rows)} rows: "
        + ", ".join(f"{name} {value:.1e}" for name, value in off.items())
    )
    server.shutdown()
    return 0 if fine and max(off.values()) <= TOLERANCE else 1


if __name__ == "__main__":
    raise SystemExit(main())
