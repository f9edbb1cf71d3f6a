"""Which commit a run or a page comes from."""

from __future__ import annotations

import subprocess
from pathlib import Path


def commit() -> str:
    """The commit of this program, "+" behind it with changes that are not committed; "not known" outside of git."""
    here = Path(__file__).parent
    try:
        head, changes = (
            subprocess.run(
                ["git", *words], cwd=here, capture_output=True, text=True, check=True, timeout=20
            ).stdout.strip()
            for words in (
                ("rev-parse", "--short=12", "HEAD"),
                ("status", "--porcelain", "--untracked-files=no", "--", "."),
            )
        )
    except (OSError, subprocess.SubprocessError):
        return "not known"
    return f"{head}+" if changes else head
