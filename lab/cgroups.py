"""Memory cgroups, version 1 or 2, below our own; None where the system does not allow them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def _own(mounts: str, memberships: str) -> tuple[Path, int] | None:
    """Folder of this process's memory cgroup and the version.

    Parameters
    ----------
    mounts, memberships : str
        Texts of /proc/self/mountinfo and /proc/self/cgroup.

    Examples
    --------
    >>> _own("35 31 0:32 / /cg/memory rw - cgroup cgroup rw,memory", "4:memory:/a")
    (PosixPath('/cg/memory/a'), 1)
    >>> _own("30 23 0:26 / /cg rw - cgroup2 cgroup2 rw", "0::/user/b")
    (PosixPath('/cg/user/b'), 2)
    """
    member: dict[str, str] = {}
    for line in memberships.splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            member[controller] = path
    unified = None
    for line in mounts.splitlines():
        left, _, right = line.partition(" - ")
        root, point = left.split()[3:5]
        kind, _, options = right.split()[:3]
        if kind == "cgroup" and "memory" in options.split(","):
            path, version = member.get("memory", "/"), 1
        elif kind == "cgroup2":
            path, version = member.get("", "/"), 2
        else:
            continue
        inside = path[len(root) :] if root != "/" and path.startswith(root) else path
        found = Path(point) / inside.strip("/")
        if version == 1:
            return found, 1
        unified = found, 2
    return unified


def _make(own: Path, version: int) -> Path | None:
    if version == 2 and "memory" not in _read(own / "cgroup.subtree_control").split():
        return None  # ours alone to enable only in a group without processes, which ours is not
    _sweep(own)
    group = own / f"expertfleet-{os.getpid()}"
    try:
        group.mkdir(exist_ok=True)
        if version == 2:
            (group / "cgroup.subtree_control").write_text("+memory")
    except OSError:
        return None
    return group


def _sweep(own: Path) -> None:
    """Remove the groups of labs that were killed."""
    for group in own.glob("expertfleet-*"):
        if not Path("/proc", group.name.rpartition("-")[2]).exists():
            _remove([*(p for p in group.iterdir() if p.is_dir()), group])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return ""


@contextmanager
def memory_groups(names: list[str]) -> Iterator[dict[str, Path]]:
    """One memory cgroup per name, removed at the end; an empty dict where that is not allowed."""
    own = _own(_read(Path("/proc/self/mountinfo")), _read(Path("/proc/self/cgroup")))
    parent = _make(*own) if own is not None and own[0].is_dir() else None
    groups: dict[str, Path] = {}
    try:
        if parent is not None:
            try:
                for name in names:
                    (parent / name).mkdir(exist_ok=True)
                    groups[name] = parent / name
            except OSError:
                _remove([*groups.values()])
                groups = {}
        yield groups
    finally:
        if parent is not None:
            _remove([*groups.values(), parent])


def _remove(folders: list[Path]) -> None:
    for folder in folders:
        for _ in range(20):  # the kernel needs a moment after the last process has gone
            try:
                folder.rmdir()
                break
            except FileNotFoundError:
                break
            except OSError:
                time.sleep(0.05)
