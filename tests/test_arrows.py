"""Who may import whom, read from the source, and once more from a real process."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"protocol", "device_profiles", "export", "edge", "server", "lab", "reference_base"}
HEAVY = {
    "torch",
    "torchao",
    "executorch",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "onnx",
    "onnxruntime",
    "optimum",
}
LEAVES = {"protocol", "device_profiles"}
# Modules of the edge that may import what is heavy; the ExecuTorch path does without.
BACKENDS = ("_torch", "_nf4", "_onnx")
# Which of our own packages each may import, besides itself. What is not listed may import anything.
ALLOWED = {
    "protocol": set(),
    "device_profiles": {"protocol"},
    "export": LEAVES | {"reference_base"},
    "edge": LEAVES,
    "server": LEAVES,
    "reference_base": LEAVES,
}


def imported(source):
    """Top-level names that a module imports anywhere in it, also by `importlib` with a literal name."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.Call) and node.args:
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            literal = getattr(node.args[0], "value", None)
            if name in ("import_module", "__import__") and isinstance(literal, str):
                found.add(literal.split(".")[0])
    return found


def forbidden(path, source):
    """What the module at `path` (relative to the root) imports against the rules."""
    package, names = path.parts[0], imported(source)
    wrong = (names & OURS) - {package} - ALLOWED.get(package, OURS)
    if package in ALLOWED:
        wrong |= names & {"tests", "benchmarks"}
    if package == "protocol":
        wrong |= names - sys.stdlib_module_names - {"numpy", "safetensors", "protocol"}
    if package == "device_profiles":
        wrong |= names - sys.stdlib_module_names - {"tomli", "protocol", "device_profiles"}
    backend = path.stem.endswith(BACKENDS)
    if package == "server" or (package == "edge" and not backend):
        wrong |= names & HEAVY
    return wrong


def modules():
    return sorted(path for package in ALLOWED for path in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows(path):
    assert forbidden(path.relative_to(ROOT), path.read_text()) == set()


@pytest.mark.parametrize(
    ("path", "source", "wrong"),
    [
        ("edge/run.py", "import server.app", {"server"}),
        ("edge/run.py", "from export import build", {"export"}),
        ("edge/run.py", "def f():\n    import torch", {"torch"}),
        ("edge/session_torch.py", "import torch", set()),
        ("edge/session_executorch.py", "import torch", {"torch"}),
        ("edge/native/__init__.py", "import executorch.runtime", {"executorch"}),
        ("edge/submoe_torch.py", "import torch", set()),
        ("server/app.py", "import importlib\nimportlib.import_module('torch.nn')", {"torch"}),
        ("server/app.py", "from edge.data import batches", {"edge"}),
        ("export/build.py", "from server import store", {"server"}),
        ("export/build.py", "import torch, protocol.packing, device_profiles", set()),
        ("protocol/names.py", "import requests", {"requests"}),
        ("protocol/names.py", "from device_profiles import load", {"device_profiles"}),
        ("device_profiles/__init__.py", "import numpy", {"numpy"}),
        ("lab/run.py", "import server, edge, export, torch", set()),
        ("server/rounds.py", "from . import store", set()),
    ],
)
def test_the_rules_see_a_wrong_import(path, source, wrong):
    assert forbidden(Path(path), source) == wrong


def test_nothing_heavy_in_a_process_that_imports_server_edge_and_leaves():
    names = sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for package in ("protocol", "device_profiles", "server", "edge")
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__main__.py" and not (package == "edge" and path.stem.endswith(BACKENDS))
    )
    code = (
        "import importlib, sys\n"
        f"for name in {names}: importlib.import_module(name)\n"
        f"print(sorted({HEAVY} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
