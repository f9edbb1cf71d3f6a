"""Build the native library, if it is not built yet, and print where it is: python -m edge.native."""

import sys

from edge.native import NativeError, library

try:
    print(library()._name)
except NativeError as error:
    print(f"edge.native: {error}", file=sys.stderr)
    raise SystemExit(2) from None
