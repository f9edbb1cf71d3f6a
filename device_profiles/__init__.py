"""Facts about kinds of devices: one TOML per kind, checked on loading.

MB here means 2**20 bytes, as in `budget_mb * 2**20`; Mbit and GB/s are decimal.
"""

from __future__ import annotations

import difflib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from protocol import schema

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parent
Backend = Literal["executorch", "torch", "torch-nf4"]


class ProfileError(ValueError):
    """A profile that does not exist or cannot be used. One line."""


@dataclass(frozen=True, kw_only=True)
class DeviceProfile:
    """What a kind of device has, and the shape of training that suits it."""

    name: str
    description: str
    memory_mb: int  # RAM of the device
    budget_mb: int  # what a training program may use beyond the process's size before it is opened
    flash_mb: int
    flash_budget_mb: int  # what an artifact and its updates may take of it
    gflops: float  # fp32, all CPU cores, sustained
    memory_gb_s: float  # peak of the memory bus
    downlink_mbit: float
    uplink_mbit: float
    uplink_mb: float  # what the device may send in a round
    deadline_s: float  # what training and upload of a round may take
    backend: Backend
    rank: int  # of LoRA
    sequence: int  # tokens per row
    batch: int  # rows per step
    sources: tuple[str, ...]  # where each figure comes from; derived figures say how

    def __post_init__(self) -> None:
        for field in (
            "memory_mb",
            "budget_mb",
            "flash_mb",
            "flash_budget_mb",
            "gflops",
            "memory_gb_s",
            "downlink_mbit",
            "uplink_mbit",
            "uplink_mb",
            "deadline_s",
            "rank",
            "sequence",
            "batch",
        ):
            if getattr(self, field) <= 0:
                raise ProfileError(f"{field} {getattr(self, field)} found, more than 0 wanted")
        for part, whole in (("budget_mb", "memory_mb"), ("flash_budget_mb", "flash_mb")):
            if getattr(self, part) > getattr(self, whole):
                raise ProfileError(
                    f"{part} {getattr(self, part)} found, at most {whole} {getattr(self, whole)} wanted"
                )

    @property
    def budget_bytes(self) -> int:
        """`budget_mb` in bytes."""
        return self.budget_mb << 20


def names() -> list[str]:
    """Profiles that ship with the project, sorted.

    >>> "pixel_8" in names()
    True
    """
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def _path(name_or_path: str | Path) -> Path:
    text = str(name_or_path)
    if text in names():
        return FOLDER / f"{text}.toml"
    path = Path(name_or_path)
    if path.suffix == ".toml" or len(path.parts) > 1:
        return path
    close = difflib.get_close_matches(text, names(), n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(names())}"
    raise ProfileError(f"unknown profile '{text}', {hint}")


def _parse(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ProfileError(f"{path}: no such file") from error
    except OSError as error:
        raise ProfileError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        line = " ".join(str(error).split())
        raise ProfileError(f"{path}: not TOML: {line}") from error


def load(name_or_path: str | Path) -> DeviceProfile:
    """Read a profile by its name, or from any TOML file.

    Parameters
    ----------
    name_or_path : str or Path
        One of `names()`, or a path that ends in `.toml` or has a folder in it.

    Raises
    ------
    ProfileError
        Unknown profile or key (the nearest known one is named), no TOML, missing key, wrong type or range.
    """
    path = _path(name_or_path)
    # A shipped profile is named by its file, anything else by the path that was given.
    where = path.name if path.parent == FOLDER else str(path)
    try:
        return schema.from_dict(DeviceProfile, _parse(path), where)
    except schema.SchemaError as error:
        raise ProfileError(str(error)) from error
    except ProfileError as error:
        text = str(error)
        raise ProfileError(text if str(path) in text else f"{where}: {text}") from error
