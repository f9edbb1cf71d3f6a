"""How long the server takes to listen, and what it weighs when idle.

    python -m benchmarks.server_start [--store STORE] [--repeats 7]

Prints the median seconds from starting the process to its first answer on /healthz (target < 1 s), and the resident
memory of the idle server 3 s later (target < 150 MB; the broker's own is printed beside it). Without --store a store of
the reference base's size is made up: 4 layers of 16 experts, hidden 160, intermediate 192.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np

from protocol import PROTOCOL_VERSION, manifest, tensors
from protocol.manifest import (
    BaseIndex,
    Blob,
    Manifest,
    MemoryPlan,
    PeftLayout,
    Program,
    Shape,
    Slot,
)

LAYERS, EXPERTS, HIDDEN, INTERMEDIATE = 4, 16, 160, 192


def made_up_store(folder: Path) -> None:
    """Write base.json, one manifest and the dense blob."""
    (folder / "blobs").mkdir(parents=True)
    routers = {f"layers.{i}.router": np.ones((EXPERTS, HIDDEN), np.float32) for i in range(LAYERS)}
    data = tensors.encode(routers)
    dense = Blob(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
    (folder / "blobs" / dense.sha256).write_bytes(data)
    keys = {"lora_A": "{layer}.A", "lora_B": "{layer}.B"}
    base = BaseIndex(
        protocol=PROTOCOL_VERSION, base="0" * 64, model_type="olmoe", config={},
        moe_layers=tuple(range(LAYERS)), num_experts=EXPERTS, top_k=2, hidden=HIDDEN,
        intermediate=INTERMEDIATE, vocabulary=4096, group=32, dense={"int4": dense}, tokenizer=dense,
        experts={"int4": ((dense,) * EXPERTS,) * LAYERS}, error={"int4": 0.1},
        architecture="causal", projections=("gate_up", "down"),
        routing_prior=((1 / EXPERTS,) * EXPERTS,) * LAYERS,
        peft=PeftLayout(
            target_parameters=(), target_modules=(), modules_to_save=(), router="{layer}.r", base_model_class="",
            parent_library="",
            lora={p: {f: f"{p}.{k}" for f, k in keys.items()} for p in ("gate_up", "down")},
        ),
    )  # fmt: skip
    program = Program(
        blob=dense, method="forward", inputs=(), parameters=(), outputs=(), arena_bytes=0
    )
    artifact = Manifest(
        protocol=PROTOCOL_VERSION, base=base.base, profile="p",
        shape=Shape(
            batch=4, sequence=128, answers=1, dense="int4",
            slots=((Slot(format="int4", rank=8),) * 8,) * LAYERS,
        ),
        train=program, evaluate=program, dense=dense, tokenizer=dense, experts={},
        memory=MemoryPlan(
            budget=1, arena=0, inputs=0, parameters=0, optimizer=0, outputs=0, runtime=0
        ),
    )  # fmt: skip
    (folder / "p").mkdir()
    (folder / "base.json").write_bytes(manifest.to_json(base))
    (folder / "p" / "manifest.json").write_bytes(manifest.to_json(artifact))


def resident_bytes(pid: int) -> int:
    """RSS of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) << 10


def children(pid: int) -> list[int]:
    """Direct children of a process."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def measure(store: Path, state: Path, idle: bool) -> tuple[float, int, int]:
    """Seconds to the first answer; RSS of server and broker in bytes (0 without `idle`)."""
    command = [
        sys.executable, "-m", "server", "--store", str(store), "--state", str(state), "--port", "0",
    ]  # fmt: skip
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[2]
        with urllib.request.urlopen(f"{url}/healthz") as response:
            assert json.load(response)["ok"]
        seconds = time.perf_counter() - start
        if not idle:
            return seconds, 0, 0
        time.sleep(3)
        broker = sum(resident_bytes(child) for child in children(process.pid))
        return seconds, resident_bytes(process.pid), broker
    finally:
        process.terminate()
        process.wait()


def main() -> int:
    """Print the figures; 1 when a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = args.store
        if store is None:
            store = Path(folder) / "store"
            made_up_store(store)
        times = [measure(store, Path(folder) / f"s{i}", False)[0] for i in range(args.repeats)]
        _, server, broker = measure(store, Path(folder) / "idle", True)
    median = statistics.median(times)
    print(
        f"listening after {median:.2f} s (median of {len(times)}, {min(times):.2f}-{max(times):.2f})"
    )
    print(f"idle RSS {server / 1e6:.0f} MB (broker {broker / 1e6:.0f} MB)")
    return 0 if median < 1 and server < 150e6 else 1


if __name__ == "__main__":
    sys.exit(main())
