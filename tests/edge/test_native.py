"""The compiled operators against their eager reference, and what happens when something is not as it should be."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge import native
from protocol import packing
from tests.export.operands import Layer, program, routing, run

OPS = torch.ops.expertfleet
MIXED = ("int4", "int8", "nf4", "int4")


def close(found, wanted, message):
    wanted = wanted.detach().numpy()
    scale = max(0.1, float(np.abs(wanted).max(initial=0)))
    np.testing.assert_allclose(found, wanted, atol=2e-5 * scale, rtol=1e-4, err_msg=message)


def step_of(layer):
    """Everything the routed experts give: y, norms, and the gradients for `dy`."""
    rest = layer.rest()

    def step(x, weight, slot, dy, *tensors):
        wanted = [t.detach().requires_grad_(True) for t in (x, weight, *tensors[4:])]
        frozen, factors = tensors[:4], wanted[2:]
        y, _ = OPS.routed_experts(wanted[0], wanted[1], slot, *frozen, *factors, *rest)
        gradients = torch.autograd.grad(y, wanted, dy)
        again, norms = OPS.routed_experts_norms(x, weight, slot, *tensors, *rest)
        return y.detach(), again, norms, *gradients

    return step


NAMES = ("y", "y again", "norms", "dx", "dweight", "d_up_a", "d_up_b", "d_down_a", "d_down_b")
LAYERS = {
    "silu, 10 tokens": (Layer(MIXED, (8, 0, 4, 1)), 10, 2),
    "one token": (Layer(MIXED, (4, 4, 0, 2)), 1, 2),
    "gelu, no gate": (Layer(("nf4", "int8"), (1, 8), "gelu", False, 96, 64), 33, 1),
    "gelu_tanh, wide": (Layer(("int8", "int4"), (8, 6), "gelu_tanh", True, 288, 160), 40, 2),
    "relu, one slot": (Layer(("int4",), (5,), "relu", False), 7, 1),
    "600 tokens": (Layer(MIXED, (4, 2, 0, 1), "silu", True, 64, 64), 600, 2),
}


@pytest.fixture(scope="module", params=list(LAYERS))
def lowered(request, tmp_path_factory):
    """(layer, tokens, k, eager step, opened program)."""
    layer, tokens, k = LAYERS[request.param]
    tensors, step = layer.tensors(), step_of(layer)
    weight, slot = routing(tokens, k, len(layer.formats))
    x = torch.zeros(tokens, layer.hidden)
    path = tmp_path_factory.mktemp("program") / "step.pte"
    opened = program(step, [x, weight, slot, x.clone(), *tensors], path)
    yield layer, tokens, k, step, opened
    opened.close()


@settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.integers(0, 99), st.data())
def test_routed_experts_and_their_gradients(lowered, seed, data):
    layer, tokens, k, step, opened = lowered
    count = len(layer.formats)
    # Some slots may get no token at all; with k of them left, those get every token.
    among = sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=k, max_size=count)))
    weight, slot = routing(tokens, k, count, seed, among)
    torch.manual_seed(seed)
    x, dy = torch.randn(tokens, layer.hidden), torch.randn(tokens, layer.hidden)
    arguments = [x, weight, slot, dy, *layer.tensors(seed)]
    for name, found, wanted in zip(NAMES, run(opened, arguments), step(*arguments), strict=True):
        close(found, wanted, name)


def test_two_threads_give_what_one_gives(lowered):
    layer, tokens, k, _, opened = lowered
    weight, slot = routing(tokens, k, len(layer.formats), 3)
    x, dy = torch.randn(tokens, layer.hidden), torch.randn(tokens, layer.hidden)
    arguments = [x, weight, slot, dy, *layer.tensors(3)]
    native.set_threads(1)
    alone = run(opened, arguments)
    native.set_threads(2)
    try:
        for name, one, two in zip(NAMES, alone, run(opened, arguments), strict=True):
            np.testing.assert_array_equal(two, one, err_msg=name)
    finally:
        native.set_threads(1)


@pytest.mark.parametrize("bad", [-1, 4, 1 << 40, "the token's other slot"])
def test_a_slot_that_does_not_exist_or_comes_twice_is_an_error(lowered, bad):
    layer, tokens, k, step, opened = lowered
    weight, slot = routing(tokens, k, len(layer.formats))
    good = int(slot[-1, -1])
    if bad == "the token's other slot":
        bad = -1 if k == 1 else int(slot[-1, 0])
    slot[-1, -1] = bad
    x = torch.zeros(tokens, layer.hidden)
    arguments = [x, weight, slot, x, *layer.tensors()]
    with pytest.raises(native.NativeError, match="slots_exist"):
        run(opened, arguments)
    slot[-1, -1] = good
    run(opened, arguments)  # and the program is still good


@pytest.mark.parametrize("format", packing.FORMATS)
@pytest.mark.parametrize(
    ("tokens", "out", "features"), [(1, 10, 64), (70, 200, 320), (300, 65, 32)]
)
def test_packed_products(format, tokens, out, features, tmp_path):
    number = packing.FORMATS.index(format)
    rng = np.random.default_rng(0)
    packed, scale = packing.quantize(rng.normal(size=(out, features)), format)
    ids = torch.from_numpy(rng.integers(0, out, (2, 5)))

    def step(x, ids, packed, scale):
        y = OPS.packed_linear(x, packed, scale, number, out)
        back = OPS.packed_linear_backward(y, packed, scale, number, features)
        return y, back, OPS.packed_embedding(ids, packed, scale, number, features)

    flat = [torch.from_numpy(part.reshape(-1)) for part in (packed, scale)]
    arguments = [torch.randn(tokens, features), ids, *flat]
    opened = program(step, arguments, tmp_path / "step.pte")
    for found, wanted in zip(run(opened, arguments), step(*arguments), strict=True):
        close(found, wanted, format)
    for bad in (out, -1):
        ids[1, 2] = bad
        with pytest.raises(native.NativeError, match=f"token {bad} of {out}"):
            run(opened, arguments)
    opened.close()


@pytest.mark.parametrize(
    ("batch", "heads", "groups", "tokens", "width", "value", "window"),
    [
        (2, 4, 2, 12, 8, 8, 0),
        (1, 3, 1, 70, 16, 32, 0),
        (1, 2, 2, 130, 8, 24, 33),
        (2, 2, 1, 65, 8, 8, 1),
        (1, 4, 4, 1, 8, 8, 0),
    ],
)
def test_attention(batch, heads, groups, tokens, width, value, window, tmp_path):
    def step(q, k, v, dy):
        wanted = [t.detach().requires_grad_(True) for t in (q, k, v)]
        y, lse = OPS.causal_attention(*wanted, 0.7, window)
        return y.detach(), lse.detach(), *torch.autograd.grad(y, wanted, dy)

    torch.manual_seed(tokens)
    arguments = [
        torch.randn(batch, heads, tokens, width),
        torch.randn(batch, groups, tokens, width),
        torch.randn(batch, groups, tokens, value),
        torch.randn(batch, tokens, heads, value),
    ]
    opened = program(step, arguments, tmp_path / "step.pte")
    results = zip(("y", "lse", "dq", "dk", "dv"), run(opened, arguments), strict=True)
    for (name, found), wanted in zip(results, step(*arguments), strict=True):
        close(found, wanted, name)
    opened.close()


@pytest.fixture
def double(tmp_path):
    """A program that doubles three numbers."""
    opened = program(lambda x: x * 2.0, [torch.zeros(3)], tmp_path / "double.pte")
    yield opened
    opened.close()


def test_outputs_and_refused_inputs(double):
    x = np.array([1, 2, 3], np.float32)
    (y,) = double.run("forward", [x])
    assert y.tolist() == [2, 4, 6]
    assert double.arena_bytes("forward") > 0
    for bad in (x[:2], x.astype(np.float64), np.zeros(6, np.float32)[::2], x.astype(np.int64)):
        with pytest.raises(native.NativeError):
            double.run("forward", [bad])
    with pytest.raises(native.NativeError, match="cannot be passed"):
        double.run("forward", [np.zeros((1,) * 9, np.float32)])
    for count in (0, 2):
        with pytest.raises(native.NativeError, match=f"^{count} inputs, 1 wanted$"):
            double.run("forward", [x] * count)
    with pytest.raises(native.NativeError):
        double.run("backward", [x])
    assert double.run("forward", [x])[0].tolist() == [2, 4, 6]


def test_a_closed_program_does_not_run(double):
    double.close()
    double.close()
    with pytest.raises(native.NativeError, match="the program is closed"):
        double.run("forward", [np.zeros(3, np.float32)])


@pytest.mark.parametrize("content", [None, b"", b"no program", bytes(4096)])
def test_what_is_no_program_is_one_line(tmp_path, content):
    path = tmp_path / "x.pte"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(native.NativeError, match="x.pte: the runtime refuses") as refused:
        native.Program(path)
    assert "\n" not in str(refused.value)


def test_a_trace_is_written_on_request(tmp_path, double):
    with pytest.raises(native.NativeError, match="no trace"):
        double.write_trace(tmp_path / "trace")
    traced = native.Program(tmp_path / "double.pte", trace=True)
    traced.run("forward", [np.zeros(3, np.float32)])
    traced.write_trace(tmp_path / "trace")
    assert (tmp_path / "trace").stat().st_size > 100
    traced.close()


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A copy of the sources with an empty cache, compiled by a script that only writes down that it ran."""
    folder = tmp_path / "native"
    folder.mkdir()
    for name in (*native.SOURCES, *native.HEADERS):
        shutil.copy(Path(native.__file__).parent / name, folder)
    compiler = tmp_path / "compiler"
    compiler.write_text(
        f'#!/bin/sh\necho run >> "{tmp_path}/runs"\nfor last; do :; done\n: > "$last"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setattr(native, "__file__", str(folder / "__init__.py"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.delenv("EXPERTFLEET_NATIVE", raising=False)
    return folder


def test_the_library_is_built_once_and_again_when_a_source_changes(sources, tmp_path):
    first = native.build()
    assert native.build() == first
    assert first.parent == tmp_path / "cache" / "expertfleet"
    header = sources / "product.h"
    header.write_text(header.read_text() + "// changed\n")
    assert native.build() != first
    assert (tmp_path / "runs").read_text() == "run\nrun\n"
    assert set(os.listdir(first.parent)) == {first.name, native.build().name, "lock"}


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (
            "echo 'x.cpp:1: note'; echo 'x.cpp:2: error: expected' >&2; exit 1",
            "x.cpp:2: error: exp",
        ),
        ("exit 1", "compiler: failed"),
        (None, "compiler: No such file"),
    ],
)
def test_a_compiler_that_fails_is_one_line(sources, tmp_path, script, words):
    compiler = tmp_path / "compiler"
    compiler.unlink()
    if script is not None:
        compiler.write_text(f"#!/bin/sh\n{script}\n")
        compiler.chmod(0o755)
    with pytest.raises(native.NativeError, match=words) as refused:
        native.build()
    assert "\n" not in str(refused.value)
    assert os.listdir(tmp_path / "cache" / "expertfleet") == ["lock"]  # nothing half-built stays


def test_without_a_compiler_the_package_is_named(sources, monkeypatch):
    from edge.session import SessionError, load_backend

    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(
        native.NativeError, match=r"no C\+\+ compiler found .*apt-get install g\+\+"
    ):
        native.build()
    monkeypatch.setattr(native, "library", native.library.__wrapped__)
    with pytest.raises(SessionError, match="backend executorch: no C"):
        load_backend("executorch")


def test_a_cache_that_cannot_be_made_is_one_line(sources, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(native.NativeError, match="expertfleet: Not a directory; XDG_CACHE_HOME"):
        native.build()


def test_a_library_that_cannot_be_loaded_is_one_line(monkeypatch, tmp_path):
    (tmp_path / "broken.so").write_bytes(b"no library")
    for name in ("broken.so", "absent.so"):
        monkeypatch.setenv("EXPERTFLEET_NATIVE", str(tmp_path / name))
        with pytest.raises(native.NativeError, match=name):
            native.library.__wrapped__()


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names of x86 levels")
@pytest.mark.parametrize("march", ["x86-64-v3", "x86-64-v2"])
def test_the_same_on_narrower_registers(march):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-k",
        "experts or threads or packed or attention",
    ]
    done = subprocess.run(
        [*command, __file__], env=os.environ | {"EXPERTFLEET_MARCH": march}, capture_output=True
    )
    assert done.returncode == 0, done.stdout.decode()
