"""The simulation and the running system: the same choice of experts, and the same adapter to the last bit."""

import json

import numpy as np
import pytest
import torch

from benchmarks.federated import simulate
from benchmarks.federated.methods import Method
from edge.run import job_of
from protocol.objective import Objective
from server import adapters, leases
from server.store import Store
from tests.benchmarks import tiny_world
from tests.edge.test_device import Process
from tests.server.conftest import Server

NAMES = ("a", "b", "c")
ROUNDS = 2
CASES = {
    "plain": (["--uplink", "float32", "--downlink", "float32"], {}, {}),
    "coded": (
        ["--uplink", "int8", "--downlink", "float16"],
        {"prox": 0.01, "z_loss": 0.001},
        {"uplink": "int8", "downlink": "float16"},
    ),
    "stateful": (
        ["--uplink", "int4", "--downlink", "float16"],
        {"scaffold": True, "target_balance": 0.01, "output_scale": True},
        {"uplink": "int4", "downlink": "float16"},
    ),
}


@pytest.fixture
def one_thread(monkeypatch):
    """Here and in the processes that are started: sums in the same order."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def really_run(store, base, folder, rows, flags, objective):
    """A server and three devices until the run is over; the state's folder."""
    (folder / "task.json").write_text(json.dumps({"labels": list(tiny_world.TASK.labels)}))
    (folder / "objective.json").write_text(json.dumps(objective))
    server = Server(
        store, folder / "state", base, "--rounds", str(ROUNDS), "--min-devices", "3", "--min-updates", "2",
        "--per-round", "2", "--steps", "4", "--learning-rate", "0.01", "--router-learning-rate", "0.003",
        "--task", str(folder / "task.json"), "--objective", str(folder / "objective.json"), "--exit-when-done",
        "--exploration", "0.1",
        *flags,
    )  # fmt: skip
    devices = []
    try:
        for name, found in rows.items():
            file = folder / f"{name}.jsonl"
            file.write_text(
                "".join(json.dumps({"text": r.text, "label": r.label}) + "\n" for r in found)
            )
            arguments = [
                "edge", "--server", server.url, "--profile", "tiny", "--data", file, "--label", "label",
                "--device-id", name, "--workdir", folder / name, "--backend", "torch-routed",
                "--held-back", simulate.MEASURED, "--enforce", "none",
            ]  # fmt: skip
            devices.append(Process(arguments, folder / f"{name}.log"))
        for device in devices:
            assert device.end(400) == 0, device.text() + "\n".join(server.lines)
        server.process.wait(60)
    finally:
        for device in devices:
            device.kill()
        server.kill()
    return folder / "state"


@pytest.mark.parametrize("case", CASES)
def test_replaying_a_real_run_gives_its_adapters(
    tmp_path, tiny_store, artifact, tokenizer, one_thread, case
):
    flags, objective, how = CASES[case]
    base, shape = artifact.base, artifact.manifest.shape
    rows = {name: tiny_world.rows(i) for i, name in enumerate(NAMES)}
    state = really_run(tiny_store, base, tmp_path, rows, flags, objective)
    known = Store(state, base.base)
    rounds = [known.leases(r) for r in range(ROUNDS + 2)]
    known.close()
    assert [[r.state for r in leased.values()] for leased in rounds] == [
        ["accepted"] * n for n in (3, 2, 2, 3)
    ]

    # As the server's flags are.
    method = Method(
        name="real", exploration=0.1, coverage=0.5, objective=Objective(**objective), **how
    )
    world = tiny_world.world_of(tiny_world.base_of(artifact, tokenizer), rows)
    run = simulate.Run(world, method, tmp_path / "cache")
    run.shapes = dict.fromkeys(NAMES, shape)
    jobs = [{n: job_of(r.lease, base, shape) for n, r in leased.items()} for leased in rounds]
    held = [leases.holdings({n: r.lease for n, r in leased.items()}, base) for leased in rounds]

    # Where the simulation profiles the whole model, these devices have measured what they held.
    for name, job in jobs[0].items():
        part = run.delivered(run.slice(name, job.resident))
        run.fleet.values[name] = run._values(run.train(name, job, part, {}).stats)
    run.fleet.former = dict(held[0])
    for round in range(1, ROUNDS + 1):
        chosen = run.choose(round)
        assert {name: chosen[name] for name in held[round]} == held[round]
        run.train_round(round, jobs[round])
        real = adapters.read_version(state / "adapters", round)
        assert real.keys() == run.fleet.adapter.keys()
        moved = 0
        for name, value in adapters.read_version(state / "adapters", round - 1).items():
            np.testing.assert_array_equal(run.fleet.adapter[name], real[name], err_msg=name)
            moved += not np.array_equal(value, real[name])
        assert moved > 20
    assert run.choose(ROUNDS + 1, "evaluate") == held[-1]
