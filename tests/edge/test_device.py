"""The real edge process against the real server: a run, bad input, kills and restarts."""

import dataclasses
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from protocol import tensors

ROOT = Path(__file__).parents[2]
WORDS = {
    "sport": "the team won match after late goal by captain",
    "science": "the laboratory measured spectrum of distant galaxy",
    "finance": "the bank raised its rate and shares fell on market",
}


class Process:
    """A child whose output goes to a file; killed at the end whatever happens."""

    def __init__(self, arguments, log):
        self.log = log
        self._file = open(log, "a")
        self.child = subprocess.Popen(
            [sys.executable, "-m", *map(str, arguments)], cwd=ROOT,
            stdout=self._file, stderr=self._file,
        )  # fmt: skip

    def text(self):
        return self.log.read_text()

    def wait_for(self, words, times=1, seconds=180):
        end = time.monotonic() + seconds
        while self.text().count(words) < times:
            assert time.monotonic() < end, f"no {words!r} in\n{self.text()}"
            assert self.child.poll() is None, self.text()
            time.sleep(0.05)

    def end(self, seconds=240):
        try:
            return self.child.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running\n{self.text()}") from None

    def kill(self):
        if self.child.poll() is None:
            os.kill(self.child.pid, signal.SIGKILL)
        self.child.wait()
        self._file.close()


@pytest.fixture
def start(tmp_path):
    started = []

    def begin(name, *arguments):
        started.append(Process(arguments, tmp_path / f"{name}.log"))
        return started[-1]

    yield begin
    for process in started:
        process.kill()


@pytest.fixture
def rows(tmp_path):
    rng = random.Random(0)
    path = tmp_path / "rows.jsonl"
    with open(path, "w") as file:
        for i in range(60):
            label = rng.choice(sorted(WORDS))
            text = " ".join(rng.sample(WORDS[label].split(), 5)) + f" {i}"
            file.write(json.dumps({"text": text, "label": label}) + "\n")
    return path


@pytest.fixture
def serve(start, tiny_store, tmp_path):
    (tmp_path / "task.json").write_text(json.dumps({"labels": sorted(WORDS)}))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def begin(*flags):
        server = start(
            "server", "server", "--store", tiny_store, "--state", tmp_path / "state",
            "--port", port, "--task", tmp_path / "task.json", *flags,
        )  # fmt: skip
        url = f"http://127.0.0.1:{port}"
        end = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(url + "/healthz", timeout=2).close()
                return server, url
            except OSError:
                assert time.monotonic() < end, server.text()
                assert server.child.poll() is None, server.text()
                time.sleep(0.1)

    return begin


def edge_flags(url, rows, tmp_path, *flags, backend="torch"):
    profile = {"torch": "tiny", "executorch": "runtime"}[backend]
    return [
        "edge", "--server", url, "--profile", profile, "--data", rows, "--label", "label",
        "--backend", backend, "--workdir", tmp_path / "device", *flags,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--server", "http://h", "--data", "none.jsonl"], "none.jsonl: no such file"),
        (["--server", "http://h", "--label", "topic"], "rows.jsonl:1: no field 'topic'"),
        (["--server", "h:1"], "--server h:1: http://HOST:PORT wanted"),
        (["--server", "http://h", "--device-id", "a/b"], "device id 'a/b'"),
        (["--server", "http://h", "--backend", "tensorflow"], "invalid choice"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(rows, tmp_path, flags, words):
    defaults = [] if "--data" in flags else ["--data", str(rows)]
    done = subprocess.run(
        [sys.executable, "-m", "edge", "--profile", "tiny", "--workdir", str(tmp_path / "w"), *flags, *defaults],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert words in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_what_the_server_does_not_know_is_one_line(serve, start, rows, tmp_path):
    _, url = serve("--min-devices", "2")
    strange = tmp_path / "strange.jsonl"
    strange.write_text(rows.read_text().replace('"sport"', '"sports"'))
    labels = start("labels", *edge_flags(url, strange, tmp_path / "a"))
    profile = start("profile", *edge_flags(url, rows, tmp_path / "b", "--profile", "tinny"))
    assert labels.end() == 2
    assert "has the label 'sports'; did you mean 'sport'?" in labels.text().splitlines()[-1]
    assert profile.end() == 2
    assert "tiny" in profile.text().splitlines()[-1]
    assert "Traceback" not in labels.text() + profile.text()


def test_free_text_answers_are_learned(serve, start, rows, tmp_path):
    task = {"template": "Text: {text}\nAnswer:", "answer": "text"}
    (tmp_path / "task.json").write_text(json.dumps(task))
    server, url = serve("--steps", "40", "--rounds", "1", "--exit-when-done")
    unlabelled = [f for f in edge_flags(url, rows, tmp_path / "a") if f not in ("--label", "label")]
    without = start("without", *unlabelled)
    assert without.end() == 2
    assert "the run wants answers, name the field" in without.text().splitlines()[-1]
    edge = start("edge", *edge_flags(url, rows, tmp_path))
    assert edge.end() == 0
    assert server.end(60) == 0
    lines = [json.loads(x) for x in (tmp_path / "state" / "history.jsonl").read_text().splitlines()]
    losses = [next(iter(x["devices"].values()))["loss_after"] for x in lines]
    assert losses[-1] < 0.8 * losses[0]


def test_a_device_over_its_budget_is_stopped(serve, start, rows, tmp_path):
    _, url = serve("--steps", "5", "--rounds", "1")
    edge = start(
        "edge", *edge_flags(url, rows, tmp_path, "--budget-mb", "2", "--enforce", "rlimit")
    )
    assert edge.end() == 3
    assert "the budget is 2.0 MiB" in edge.text().splitlines()[-1]
    assert "Traceback" not in edge.text()
    assert list((tmp_path / "device" / "outbox").iterdir()) == []


@pytest.mark.parametrize(("backend", "steps"), [("torch", 60), ("executorch", 600)])
def test_kills_of_edge_server_and_broker_lose_nothing(
    serve, start, rows, tmp_path, lowered, backend, steps
):
    """Every round is in the history once, with the device in it, whoever was killed in the middle of it."""
    flags = ["--steps", str(steps), "--rounds", "2", "--exit-when-done"]
    server, url = serve(*flags)
    device = edge_flags(url, rows, tmp_path, backend=backend)
    edge = start("edge", *device)
    edge.wait_for("round=1")
    time.sleep(0.5)
    edge.kill()
    edge = start("edge", *device)
    edge.wait_for("round=1", times=2)
    server.kill()  # the broker dies with it
    time.sleep(1)
    server, _ = serve(*flags)
    edge.wait_for("round=2")
    assert edge.end() == 0
    assert server.end(60) == 0
    lines = [json.loads(x) for x in (tmp_path / "state" / "history.jsonl").read_text().splitlines()]
    assert [(x["round"], x["work"], len(x["devices"])) for x in lines] == [
        (0, "profile", 1), (1, "train", 1), (2, "train", 1), (3, "evaluate", 1),
    ]  # fmt: skip
    assert not any(x["rejected"] for x in lines)
    assert list((tmp_path / "device" / "outbox").iterdir()) == []
    log = edge.text()
    assert "Traceback" not in log
    losses = [next(iter(x["devices"].values()))["loss_after"] for x in lines]
    assert losses[2] < losses[0]
    facts = next(iter(lines[1]["devices"].values()))
    assert facts["backend"] == backend
    assert 0 < facts["peak_bytes"] < facts["budget_bytes"]


def test_an_update_from_before_the_restart_is_delivered(serve, start, rows, tmp_path):
    """Killed with an update in the outbox: the next process offers it before it asks for anything."""
    server, url = serve("--steps", "5", "--rounds", "1", "--exit-when-done")
    device = edge_flags(url, rows, tmp_path)
    edge = start("edge", *device)
    edge.wait_for("fetched")
    os.kill(server.child.pid, signal.SIGSTOP)  # the update cannot go anywhere
    try:
        end = time.monotonic() + 120
        while not list((tmp_path / "device" / "outbox").glob("*.json")):
            assert time.monotonic() < end, edge.text()
            time.sleep(0.01)
        edge.kill()
    finally:
        os.kill(server.child.pid, signal.SIGCONT)
    edge = start("edge", *device)
    assert edge.end() == 0
    assert edge.text().count("work=profile") == 1
    assert server.end(60) == 0


def test_two_processes_do_not_share_a_work_folder(start, rows, tmp_path):
    import fcntl

    (tmp_path / "device").mkdir()
    with open(tmp_path / "device" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        edge = start("edge", *edge_flags("http://127.0.0.1:9", rows, tmp_path))
        assert edge.end() == 2
    assert "another edge process is using it" in edge.text().splitlines()[-1]


def test_a_coded_run_with_state_on_the_device(serve, start, rows, tmp_path):
    """Updates in four bits with feedback, the adapter in float16, control variates: all of it in a real run."""
    (tmp_path / "objective.json").write_text(json.dumps({"prox": 0.01, "scaffold": True}))
    server, url = serve(
        "--rounds", "2", "--steps", "3", "--uplink", "int4", "--downlink", "float16",
        "--objective", tmp_path / "objective.json", "--exit-when-done",
    )  # fmt: skip
    edge = start("edge", *edge_flags(url, rows, tmp_path, "--enforce", "none"))
    assert edge.end() == 0, edge.text()
    assert server.end() == 0, server.text()
    history = (tmp_path / "state" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["version"] for line in history] == [0, 1, 2, 2]
    assert (tmp_path / "state" / "adapters" / "2" / "scaffold.safetensors").exists()
    kept = tensors.mapped(tmp_path / "device" / "kept.safetensors")
    kinds = {"residual.layers.", "residual.scaffold.", "basis.layers.", "scaffold.layers."}
    assert {k for k in kinds for n in kept if n.startswith(k)} == kinds


def test_a_device_profiles_experts_it_does_not_hold(lowered, whole, serve, start, rows, tmp_path):
    """The real device, within a limit: statistics of every expert, whose blobs are gone afterwards."""
    from protocol import update
    from protocol.manifest import to_json

    manifest = dataclasses.replace(
        lowered.manifest, profile="whole", profiling=whole.manifest.profiling
    )
    folder = lowered.blobs.parent / "whole"
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_bytes(to_json(manifest))
    server, url = serve(
        "--rounds", "1", "--steps", "1", "--profile", "full", "--profile-rows", "40",
        "--profile-clip", "16",
    )  # fmt: skip
    flags = edge_flags(url, rows, tmp_path, "--once", "--enforce", "rlimit", backend="executorch")
    flags[flags.index("runtime")] = "whole"
    device = start("device", *flags)
    outbox, end = tmp_path / "device" / "outbox", time.monotonic() + 240
    while not list(outbox.glob("*.json")):
        assert time.monotonic() < end, device.text()
        time.sleep(0.002)
    os.kill(device.child.pid, signal.SIGSTOP)  # it is gone from the outbox once it is delivered
    [path] = outbox.glob("*.safetensors")
    _, stats, facts = update.unpack(path.read_bytes(), 1 << 20)
    os.kill(device.child.pid, signal.SIGCONT)
    assert device.end() == 0, device.text()
    assert "profiled: " in device.text()
    server.wait_for("accepted")
    assert (stats["output_norm"] > 0).all()  # of the experts that it does not hold too
    assert facts.tokens <= 40 * 16
    np.testing.assert_allclose(stats["mass"].sum(-1), facts.tokens, atol=1)
    base, kept = whole.base, {p.name for p in (tmp_path / "device" / "blobs").iterdir()}
    held = [[blob.sha256 in kept for blob in layer] for layer in base.experts["int4"]]
    # int4 slots: two of layer 0 and one of layer 1.
    assert [sum(layer) for layer in held] == [2, 1]
    assert not list((tmp_path / "device" / "profiling").iterdir())
