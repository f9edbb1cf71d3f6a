"""Write a profile of the machine this runs on.

    python -m device_profiles.measure --name my_board --out my_board.toml --server http://SERVER:8765

Memory and flash are what is there, memory bandwidth that of copying, matrix throughput that of the runtime which trains
(`python -m edge.throughput`), the link that to the given server. The budgets are derived from these: see `sources` in
the file, and change what you know better.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from device_profiles import ProfileError, load
from protocol import topics

MB = 1 << 20
COPY_BYTES = 64 * MB  # beyond any cache
LINK_SECONDS = 2.0
LINK_MOST = 64 * MB
TIMEOUT = 60.0
DEADLINE = 1800
UPLINK_SECONDS = 60


class MeasureError(RuntimeError):
    """Something that cannot be measured here. One line."""


def memory_mb(
    meminfo: Path = Path("/proc/meminfo"), limits: Sequence[Path] | None = None
) -> tuple[int, int]:
    """(all, available) memory; a container's limit counts as all there is.

    Raises
    ------
    MeasureError
    """
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
        fields = {line.split(":")[0]: int(line.split()[1]) >> 10 for line in lines if ":" in line}
        total, free = fields["MemTotal"], fields["MemAvailable"]
    except (OSError, KeyError, ValueError, IndexError) as error:
        raise MeasureError(f"{meminfo}: no MemTotal and MemAvailable there") from error
    groups = Path("/sys/fs/cgroup")
    for path in limits or (
        groups / "memory.max",
        groups / "memory" / "memory.limit_in_bytes",
    ):
        try:
            limit = int(path.read_text(encoding="ascii")) // MB
        except (OSError, ValueError):
            continue  # no such controller, or "max"
        total, free = min(total, limit), min(free, limit)
    return total, free


def copy_gb_s(seconds: float = 1.0) -> float:
    """Bytes read and written per second, in 10**9, while one core copies more than caches hold; the best of many."""
    source, target = bytearray(os.urandom(MB)) * (COPY_BYTES // MB), bytearray(COPY_BYTES)
    view, best, end = memoryview(target), float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        start = time.perf_counter()
        view[:] = source
        best = min(best, time.perf_counter() - start)
    return 2 * COPY_BYTES / best / 1e9


def throughput() -> tuple[float, str]:
    """(10**9 operations per second, how measured), from the edge's runtime in a process of its own.

    Raises
    ------
    MeasureError
        With that process's last line.
    """
    command = [sys.executable, "-m", "edge.throughput"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise MeasureError(said[-1] if said else f"edge.throughput ended with {done.returncode}")
    found = json.loads(done.stdout.splitlines()[-1])
    return float(found["gflops"]), str(found["how"])


def link_mbit(server: str) -> tuple[float, float]:
    """(down, up) in 10**6 bits per second, each over transfers of at least two seconds or 64 MB.

    Raises
    ------
    MeasureError
    """
    if not server.startswith(("http://", "https://")):
        raise MeasureError(f"--server {server}: http://HOST:PORT wanted")
    url = server.rstrip("/") + "/v1/link"
    blank = os.urandom(MB)

    def down(size: int) -> None:
        with urllib.request.urlopen(f"{url}?bytes={size}", timeout=TIMEOUT) as response:
            while response.read(MB):
                pass

    def up(size: int) -> None:
        body = blank * (size // MB) or blank[:size]
        with urllib.request.urlopen(url, data=body, timeout=TIMEOUT) as response:
            response.read()

    try:
        return _rate(down), _rate(up)
    except urllib.error.HTTPError as error:
        with error:
            raise MeasureError(f"{url}: {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise MeasureError(f"{url}: {getattr(error, 'reason', error)}") from error


def _rate(transfer: Callable[[int], None]) -> float:
    """Megabits per second. Sizes grow until a transfer takes long enough: start-up should not count."""
    transfer(1)  # name, connection and code are there
    size = 256 << 10
    while True:
        start = time.perf_counter()
        transfer(size)
        spent = time.perf_counter() - start
        if spent >= LINK_SECONDS or size >= LINK_MOST:
            return size * 8 / spent / 1e6
        size = min(LINK_MOST, size * 4)


def measure(name: str, folder: Path, server: str | None) -> dict[str, Any]:
    """All keys of a profile.

    Raises
    ------
    MeasureError
    """
    memory, free = memory_mb()
    flash = shutil.disk_usage(folder).free // MB
    gflops, how = throughput()
    typical = load("raspberry_pi_5")
    link, said = (typical.downlink_mbit, typical.uplink_mbit), "not measured (no --server): "
    said += "world average of fixed lines, as in raspberry_pi_5"
    if server is not None:
        link, said = link_mbit(server), f"measured to {server}"
    uplink = round(link[1], 1) or 0.1
    return {
        "name": name,
        "description": f"{platform.node()}: {platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "memory_mb": memory,
        "budget_mb": max(1, free // 2),
        "flash_mb": flash,
        "flash_budget_mb": max(1, flash // 4),
        "gflops": round(gflops, 2),
        "memory_gb_s": round(copy_gb_s(), 1),
        "downlink_mbit": round(link[0], 1) or 0.1,
        "uplink_mbit": uplink,
        "uplink_mb": round(UPLINK_SECONDS * uplink * 1e6 / 8 / MB, 1),
        "deadline_s": DEADLINE,
        "backend": "executorch",
        "rank": typical.rank,
        "sequence": typical.sequence,
        "batch": typical.batch,
        "sources": [
            f"measured {time.strftime('%Y-%m-%d')} by python -m device_profiles.measure",
            "memory_mb: MemTotal, or the container's limit; budget_mb: derived, half of what was available",
            "flash_mb: free where the profile was written; flash_budget_mb: derived, a quarter of it",
            f"gflops: {how}",
            "memory_gb_s: one core copying, bytes read and written",
            f"downlink_mbit, uplink_mbit: {said}",
            "deadline_s: our choice, half an hour; uplink_mb: derived, a minute at uplink_mbit",
            "backend, rank, sequence, batch: our choice, as in the shipped profiles",
        ],
    }


def to_toml(profile: Mapping[str, Any], path: Path) -> str:
    """The file's text; strings of JSON are strings of TOML.

    >>> print(to_toml({"name": "a", "gflops": 1.5, "sources": ["b", "c"]}, Path("a.toml")))
    # python -m export.build --profile a.toml --out STORE
    <BLANKLINE>
    name = "a"
    gflops = 1.5
    sources = [
        "b",
        "c",
    ]
    <BLANKLINE>
    """
    lines = [f"# python -m export.build --profile {path} --out STORE", ""]
    for key, value in profile.items():
        if isinstance(value, list):
            lines += [f"{key} = [", *(f"    {json.dumps(item)}," for item in value), "]"]
        else:
            lines.append(f"{key} = {json.dumps(value)}")
    return "\n".join(lines) + "\n"


def write(profile: Mapping[str, Any], path: Path) -> None:
    """Check and write; the file is whole or not there. Raises ProfileError, OSError."""
    partial = path.with_name(f".{path.stem}.partial.toml")
    try:
        partial.write_text(to_toml(profile, path), encoding="utf-8")
        load(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; prints the file's path last."""
    parser = argparse.ArgumentParser(
        prog="python -m device_profiles.measure",
        description=(__doc__ or "").splitlines()[0],
        epilog="example: python -m device_profiles.measure --name my_board --out my_board.toml",
    )
    parser.add_argument("--name", required=True, help="of the profile; letters, digits, - and _")
    parser.add_argument("--out", type=Path, required=True, help="file to write, ends in .toml")
    parser.add_argument("--server", help="http://HOST:PORT to measure the link to")
    args = parser.parse_args(argv)
    try:
        if not topics.ID.fullmatch(args.name):
            raise MeasureError(f"--name {args.name}: letters, digits, - and _ wanted, at most 64")
        if args.out.suffix != ".toml" or not args.out.absolute().parent.is_dir():
            raise MeasureError(f"--out {args.out}: a .toml file in a folder that exists wanted")
        write(measure(args.name, args.out.absolute().parent, args.server), args.out)
    except (MeasureError, ProfileError, OSError) as error:
        print(f"device_profiles.measure: {error}", file=sys.stderr)
        return 2
    print(args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
