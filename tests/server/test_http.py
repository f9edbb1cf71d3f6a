import hashlib
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

from protocol import manifest, messages
from protocol.manifest import ManifestError
from server import adapters
from server.artifacts import Artifacts
from server.store import Store
from tests.server.conftest import PROFILES
from tests.server.fake_device import http_error


def test_downloads(serve):
    server = serve()
    device = server.device("a")
    assert json.loads(device.get("/healthz")) == {"ok": True}
    base = manifest.parse_base(json.loads(device.get("/v1/base")), "base")
    assert base == server.base
    m = manifest.parse_manifest(json.loads(device.get("/v1/artifacts/large")), "m")
    assert m.shape.slots == PROFILES["large"]
    code, text = http_error(lambda: device.get("/v1/artifacts/larg"))
    assert (code, text) == (404, "profile 'larg' is not in the store; known: large, small")
    assert http_error(lambda: device.get("/v1/artifacts/..%2Fblobs"))[0] == 404
    assert http_error(lambda: device.get("/v1/nothing"))[0] == 404

    assert base.experts["int4"][1][2] != base.experts["int8"][1][2]
    sha = base.experts["int8"][1][2].sha256
    whole = device.get(f"/v1/blobs/{sha}")
    assert hashlib.sha256(whole).hexdigest() == sha
    request = urllib.request.Request(
        f"{server.url}/v1/blobs/{sha}", headers={"Range": "bytes=100-"}
    )
    with urllib.request.urlopen(request) as response:
        assert response.status == 206
        assert response.headers["Content-Range"] == f"bytes 100-{len(whole) - 1}/{len(whole)}"
        assert response.headers["ETag"] == f'"{sha}"'
        assert "immutable" in response.headers["Cache-Control"]
        assert response.read() == whole[100:]
    with urllib.request.urlopen(f"{server.url}/v1/blobs/{sha}") as response:
        assert response.headers["ETag"] == f'"{sha}"'
    assert http_error_code(server.url, sha, {"If-None-Match": f'"{sha}"'}) == 304
    assert http_error(lambda: device.get("/v1/blobs/" + "0" * 64)) == (404, "no blob " + "0" * 64)
    assert http_error(lambda: device.get("/v1/blobs/..%2F..%2Fstate.sqlite"))[0] in (400, 404)


def http_error_code(url, sha, headers):
    try:
        urllib.request.urlopen(urllib.request.Request(f"{url}/v1/blobs/{sha}", headers=headers))
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    return 200


def test_registration(serve, tmp_path):
    (tmp_path / "task.json").write_text('{"template": "Say: {text}", "labels": ["x", "y"]}')
    server = serve("--task", str(tmp_path / "task.json"))
    device = server.device("a")
    welcome = device.register()
    assert welcome.broker == server.broker
    assert welcome.task == messages.Task(template="Say: {text}", labels=("x", "y"))
    assert device.register(welcome.token) == welcome
    refused = "device 'a' is known and this is not its token"
    assert http_error(device.register) == (409, refused)
    assert http_error(lambda: device.register("wrong")) == (409, refused)
    assert http_error(server.device("b", "huge").register)[0] == 404
    assert http_error(server.device("no/slashes").register)[0] == 400
    assert http_error(lambda: post(server.url, b"{"))[0] == 400
    assert http_error(lambda: post(server.url, b"x" * 100_000))[0] == 413
    other = b'{"kind": "ready", "device": "a", "run": "r"}'
    assert http_error(lambda: post(server.url, other)) == (400, "ready found, register wanted")
    status = json.loads(device.get("/v1/run"))
    assert list(status["devices"]) == ["a"]
    assert (status["state"], status["mean_accuracy"]) == ("waiting", None)
    assert device.get("/v1/history") == b""


def post(url, body):
    request = urllib.request.Request(url + "/v1/devices", data=body, method="POST")
    with urllib.request.urlopen(request) as response:
        return response.read()


def test_tokens_guard_blobs_when_asked(serve):
    server = serve("--require-token")
    device = server.device("a")
    path = f"/v1/blobs/{server.base.dense['int4'].sha256}"
    assert http_error(lambda: device.get(path))[0] == 401
    assert http_error(lambda: device.get(path, {"Authorization": "Bearer nobody"}))[0] == 401
    token = device.register().token
    assert device.get(path, {"Authorization": f"Bearer {token}"})


def main(*flags):
    done = subprocess.run(
        [sys.executable, "-m", "server", *flags], capture_output=True, text=True, timeout=30
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--store", "{tmp}/none"], r"server: .*/none/base\.json: no such file"),
        (["--rounds", "-1"], r"server: --rounds -1 found, 0 to 100000 wanted"),
        (
            ["--broker", "http://x"],
            r"server: broker 'http://x' found, mqtt://host:port or .* wanted",
        ),
        (["--task", "{tmp}/none.json"], r"server: .*none\.json: No such file or directory"),
        (
            ["--task", "{tmp}/bad.json"],
            r"server: .*bad\.json: unknown key 'lables', did you mean 'labels'\?",
        ),
        (["--task", "{tmp}/template.json"], r"server: .*template wants \{text\} exactly once"),
        (
            ["--task", "{tmp}/answer.json"],
            r"server: .*answer\.json: answer 'text' wants no labels, 1 found",
        ),
        (["--fleet", "a/b"], r"server: --fleet 'a/b': letters, digits, - and _ wanted"),
        (["--host", "203.0.113.1"], r"server: .*203\.0\.113\.1.*"),
    ],
)
def test_what_cannot_start_says_so_in_one_line(tmp_path, store, flags, line):
    (tmp_path / "bad.json").write_text('{"lables": ["x"]}')
    (tmp_path / "template.json").write_text('{"template": "x"}')
    (tmp_path / "answer.json").write_text('{"labels": ["x"], "answer": "text"}')
    flags = [f.replace("{tmp}", str(tmp_path)) for f in flags]
    code, _, errors = main(
        "--store", str(store[0]), "--state", str(tmp_path / "state"), "--port", "0", *flags
    )
    last = errors.strip().splitlines()[-1]
    assert code == 2
    assert re.fullmatch(line, last), errors
    assert "Traceback" not in errors


def rewrite(store, profile, change):
    path = store[0] / profile / "manifest.json"
    data = json.loads(path.read_text())
    change(data["shape"])
    path.write_text(json.dumps(data))


def test_the_rank_of_the_run_is_that_of_the_largest_slot(store):
    assert Artifacts(store[0]).rank == 2
    rewrite(store, "small", lambda shape: shape["slots"][1][0].update(rank=8))
    artifacts = Artifacts(store[0])
    assert artifacts.rank == 8
    # Built anew while the server runs: its adapter cannot grow.
    rewrite(store, "large", lambda shape: shape["slots"][1][0].update(rank=9))
    os.utime(store[0] / "large" / "manifest.json", ns=(1, 1))
    with pytest.raises(ManifestError, match="large/manifest.json: rank 9 found, at most 8 wanted"):
        artifacts.manifest("large")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda shape: shape.update(dense="nf4"), "dense nf4, the base has int4, int8"),
        (
            lambda shape: shape["slots"][0][0].update(format="nf4"),
            "slot of nf4, the base has int4, int8",
        ),
        (lambda shape: shape["slots"].pop(), "slots for 1 layers found, 2 wanted"),
    ],
)
def test_a_manifest_that_does_not_fit_the_base(tmp_path, store, change, line):
    rewrite(store, "small", change)
    code, _, errors = main("--store", str(store[0]), "--state", str(tmp_path / "state"))
    assert code == 2
    assert f"small/manifest.json: {line}" in errors


def test_a_store_without_its_dense_blob(tmp_path, store):
    (store[0] / "blobs" / store[1].dense["int4"].sha256).unlink()
    code, _, errors = main("--store", str(store[0]), "--state", str(tmp_path / "state"))
    assert code == 2
    assert "no readable dense blob" in errors


def test_a_state_of_a_lower_rank(tmp_path, store):
    first = Store(tmp_path / "state", store[1].base)
    first.put(version=0)
    first.close()
    folder = tmp_path / "state" / "adapters"
    adapters.write_version(folder, 0, adapters.fresh(store[1], 1), {})
    code, _, errors = main("--store", str(store[0]), "--state", str(tmp_path / "state"))
    assert code == 2
    assert "state: adapter of rank 1, the store has slots of rank 2" in errors


def test_help_has_an_example():
    code, text, _ = main("--help")
    assert code == 0
    assert "example:\n  python -m server --store" in text


def test_no_module_of_the_server_imports_torch():
    script = """
import importlib, pkgutil, sys, server
for m in pkgutil.iter_modules(server.__path__):
    importlib.import_module(f"server.{m.name}")
assert "server.run" in sys.modules
print([m for m in ("torch", "transformers", "executorch", "peft") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
