"""The ExecuTorch runtime without torch: our operators and a C interface, compiled against the wheel, called by ctypes.

The library is built on first use with the machine's C++ compiler (a few seconds) and kept in the user's cache, named by
a hash of everything it is made of. EXPERTFLEET_NATIVE names a library built elsewhere, EXPERTFLEET_MARCH the processor
to build for (default: this one).
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SOURCES = ("ops.cpp", "runtime.cpp")
HEADERS = ("activation.h", "attention.h", "product.h")
FLAGS = (
    *("-std=c++20", "-O3", "-fPIC", "-shared", "-w"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
    *("-DET_USE_THREADPOOL", "-DC10_USING_CUSTOM_GENERATED_MACROS"),
)
LIBRARIES = (
    *("executorch", "executorch_kernels_optimized", "executorch_kernels_quantized"),
    *("executorch_threadpool", "executorch_backend_xnnpack", "executorch_etdump"),
)
MAX_DIMS = 8
DTYPES = {
    0: np.uint8,
    1: np.int8,
    3: np.int32,
    4: np.int64,
    5: np.float16,
    6: np.float32,
    11: np.bool_,
}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
ROOM = 512


class NativeError(RuntimeError):
    """The native library cannot be built or refuses a call."""


class _Array(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("sizes", ctypes.c_int64 * MAX_DIMS),
        ("dims", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
    ]


def _sdk() -> Path:
    found = importlib.util.find_spec("executorch")
    if found is None or not found.submodule_search_locations:
        raise NativeError("executorch is not installed, its wheel has the runtime")
    return Path(next(iter(found.submodule_search_locations)))


def _cpu() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), "")


def build() -> Path:
    """Path of the library, compiled when it is not there yet.

    Raises
    ------
    NativeError
        No compiler, no executorch, or the compiler's first error.
    """
    if given := os.environ.get("EXPERTFLEET_NATIVE"):
        return Path(given)
    folder, sdk = Path(__file__).parent, _sdk()
    flags = (*FLAGS, f"-march={os.environ.get('EXPERTFLEET_MARCH', 'native')}")
    digest = hashlib.sha256()
    for name in (*SOURCES, *HEADERS):
        digest.update((folder / name).read_bytes())
    for fact in (*flags, *LIBRARIES, version("executorch"), str(sdk), _cpu()):
        digest.update(fact.encode() + b"\0")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "expertfleet"
    library = cache / f"native-{digest.hexdigest()[:16]}.so"
    if library.is_file():
        return library
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        raise NativeError("no C++ compiler found (on Debian and Ubuntu: apt-get install g++)")
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NativeError(
            f"{cache}: {error.strerror}; XDG_CACHE_HOME names another place"
        ) from error
    include = sdk / "include"
    command = [
        *(compiler, *flags, f"-I{include}"),
        f"-I{include}/executorch/runtime/core/portable_type/c10",
        *(str(folder / name) for name in SOURCES),
        # Kernels register themselves when their library is loaded: none may be dropped as unused.
        *(f"-L{sdk / 'lib'}", "-Wl,--no-as-needed", *(f"-l{name}" for name in LIBRARIES)),
        f"-Wl,-rpath,{sdk / 'lib'}",
    ]
    with open(cache / "lock", "w") as lock, tempfile.TemporaryDirectory(dir=cache) as scratch:
        # One of the processes that start together compiles, the others wait for it.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if library.is_file():
            return library
        made = Path(scratch) / "native.so"
        try:
            done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True)
        except OSError as error:
            raise NativeError(f"{compiler}: {error.strerror}") from error
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line]
            raise NativeError(f"{compiler}: {(errors or ['failed'])[0]}")
        os.replace(made, library)
    return library


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library; raises NativeError."""
    path = build()
    try:
        native = ctypes.CDLL(str(path), mode=ctypes.RTLD_LOCAL)
    except OSError as error:
        raise NativeError(f"{path}: {error}") from error
    text, program = ctypes.c_char_p, ctypes.c_void_p
    arrays = ctypes.POINTER(_Array)
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "set_threads": (ctypes.c_int, [ctypes.c_uint32]),
        "open": (program, [text, ctypes.c_int, text, ctypes.c_size_t]),
        "write_trace": (ctypes.c_int, [program, text]),
        "arena": (ctypes.c_int64, [program, text]),
        "run": (ctypes.c_int, [program, text, arrays, ctypes.c_int32, text, ctypes.c_size_t]),
        "output_count": (ctypes.c_int32, [program]),
        "output": (ctypes.c_int, [program, ctypes.c_int32, arrays]),
        "close": (None, [program]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(native, f"expertfleet_{name}")
        function.restype, function.argtypes = result, arguments
    return native


def set_threads(count: int) -> None:
    """How many threads the operators share, for the whole process."""
    if library().expertfleet_set_threads(count):
        raise NativeError(f"{count} threads are refused by the runtime")


class Program:
    """An open program. Its outputs are its own memory: valid until the next run or `close`."""

    def __init__(self, path: Path, *, trace: bool = False) -> None:
        self._library = library()
        message = ctypes.create_string_buffer(ROOM)
        self._handle = self._library.expertfleet_open(str(path).encode(), trace, message, ROOM)
        if not self._handle:
            reason = message.value.decode(errors="replace")
            raise NativeError(f"{path}: the runtime refuses the program: {reason}")

    def arena_bytes(self, method: str) -> int:
        """Memory that the program plans for itself."""
        return int(self._library.expertfleet_arena(self._handle, method.encode()))

    def run(self, method: str, inputs: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """Call a method; the arrays must be C-contiguous.

        Raises
        ------
        NativeError
            The runtime refuses the inputs, or an operator fails.
        """
        if not self._handle:
            raise NativeError("the program is closed")
        given = (_Array * len(inputs))()
        for slot, value in zip(given, inputs, strict=True):
            whole = value.flags.c_contiguous and value.ndim <= MAX_DIMS
            if not whole or value.dtype not in CODES:
                raise NativeError(f"input of {value.dtype} {value.shape} cannot be passed")
            slot.data, slot.dims, slot.dtype = value.ctypes.data, value.ndim, CODES[value.dtype]
            slot.sizes[: value.ndim] = value.shape
        message = ctypes.create_string_buffer(ROOM)
        if self._library.expertfleet_run(
            self._handle, method.encode(), given, len(inputs), message, ROOM
        ):
            raise NativeError(message.value.decode(errors="replace"))
        return [
            self._output(i) for i in range(self._library.expertfleet_output_count(self._handle))
        ]

    def _output(self, index: int) -> NDArray[Any]:
        found = _Array()
        if self._library.expertfleet_output(self._handle, index, ctypes.byref(found)):
            raise NativeError(f"output {index} is not a tensor")
        shape, dtype = tuple(found.sizes[: found.dims]), np.dtype(DTYPES[found.dtype])
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if size == 0:
            return np.empty(shape, dtype)
        memory = (ctypes.c_char * size).from_address(found.data)
        return np.ndarray(shape, dtype, memoryview(memory))

    def write_trace(self, path: Path) -> None:
        """Write the time of every operator so far, as an ETDump; needs `trace`."""
        if self._library.expertfleet_write_trace(self._handle, str(path).encode()):
            raise NativeError(f"{path}: no trace could be written")

    def close(self) -> None:
        """Give the memory back; outputs of the last run must not be touched any more."""
        if self._handle:
            self._library.expertfleet_close(self._handle)
            self._handle = None
