"""`python -m edge`: take part in a server's run with local text."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from edge.data import DataError
from edge.fetch import FetchError
from edge.identity import IdentityError
from edge.limits import EXIT_OVER_BUDGET, MIB, LimitError, OverBudgetError
from edge.link import LinkError
from edge.outbox import OutboxError
from edge.run import Options, run
from edge.session import BACKENDS, SessionError
from edge.slots import SlotError
from edge.trust import TrustError

KEEP = "flash up to which experts that were only profiled stay there (0: each is dropped after use)"
EXAMPLE = """example:
  python -m edge --server http://192.168.1.10:8470 --profile jetson_orin_nano \\
      --data notes.jsonl.gz --text text --label topic
"""


def parse(argv: Sequence[str] | None) -> Options:
    """Command line -> options; exits with 2 on a mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m edge",
        description="Train the experts this device holds on its own text. The text never leaves it.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--server", required=True, metavar="URL", help="http://HOST:PORT of the server")
    add("--profile", required=True, help="which of the server's artifacts fits this device")
    add("--data", required=True, type=Path, metavar="FILE", help="JSON lines, .gz allowed")
    add("--text", default="text", metavar="FIELD", help="field with the text (text)")
    add(
        "--label",
        metavar="FIELD",
        help="field with the label or answer; without: language modelling",
    )
    add("--device-id", metavar="ID", help="name in the fleet (remembered in the work folder)")
    add("--workdir", type=Path, metavar="DIR", help="blobs and outbox (.edge/ID or .edge/PROFILE)")
    add("--backend", choices=sorted(BACKENDS), default="executorch", help="(executorch)")
    add("--budget-mb", type=float, metavar="MB", help="memory, 2^20 bytes each (the artifact's)")
    add("--enforce", default="none", metavar="HOW", help="none, rlimit or cgroup:/PATH (none)")
    add("--trust", type=Path, metavar="KEY", help="public key of the artifacts (the first met)")
    add("--held-back", type=int, default=64, metavar="N", help="rows to evaluate on (64)")
    add("--keep-mb", type=float, default=0.0, metavar="MB", help=KEEP)
    add("--once", action="store_true", help="stop after one lease")
    add("--verbose", action="store_true", help="say more")
    found = parser.parse_args(argv)
    if found.budget_mb is not None and not 0 < found.budget_mb < 1 << 30:
        parser.error(f"--budget-mb {found.budget_mb}: more than 0 wanted")
    if not 0 <= found.keep_mb < 1 << 30:
        parser.error(f"--keep-mb {found.keep_mb}: 0 or more wanted")
    if found.held_back < 1:
        parser.error(f"--held-back {found.held_back}: at least 1 wanted")
    logging.basicConfig(
        level=logging.DEBUG if found.verbose else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
    )
    return Options(
        server=found.server,
        profile=found.profile,
        data=found.data,
        text=found.text,
        label=found.label,
        device=found.device_id,
        workdir=found.workdir or Path(".edge") / (found.device_id or found.profile),
        backend=found.backend,
        budget_bytes=None if found.budget_mb is None else int(found.budget_mb * MIB),
        enforce=found.enforce,
        held_back=found.held_back,
        once=found.once,
        trust=found.trust,
        keep_bytes=int(found.keep_mb * MIB),
    )


def _terminate(number: int, frame: Any) -> NoReturn:
    raise SystemExit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the device; boundary errors become one line and an exit code: 2 bad input, 3 over the memory budget."""
    options = parse(argv)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        run(options)
    except OverBudgetError as error:
        print(f"edge: {error}", file=sys.stderr)
        return EXIT_OVER_BUDGET
    except (
        DataError,
        FetchError,
        IdentityError,
        LimitError,
        LinkError,
        OutboxError,
        SessionError,
        SlotError,
        TrustError,
    ) as error:
        print(f"edge: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
