"""Runs whose leases code the updates, round the adapter on its way down, and carry control variates."""

import json

import numpy as np
from safetensors.numpy import load_file

from server import scaffold
from tests.server.test_round_trip import run_all


def trained_adapter(server, fleet, version=2):
    """The last adapter of two rounds, and the bytes of the first round's updates."""
    leases = run_all([fleet(server.device("a")), fleet(server.device("b"))])
    history = (server.state / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["version"] for line in history] == [0, 1, 2, 2]
    return load_file(server.state / "adapters" / str(version) / "adapter.safetensors"), leases


def objective(tmp_path, **fields):
    path = tmp_path / "objective.json"
    path.write_text(json.dumps(fields))
    return "--objective", str(path)


def test_coded_rounds_end_near_plain_ones(serve, fleet, tmp_path):
    flags = (
        "--rounds",
        "2",
        "--min-devices",
        "2",
        "--gate-warmup",
        "1",
        "--gate-rate-factor",
        "0.5",
    )
    as_it_is = ("--uplink", "float32", "--downlink", "float32")
    plain, leases = trained_adapter(serve(*flags, *as_it_is), fleet)
    # Rows are frozen in the first training round, and then learn at half of 3e-3.
    assert [x.router_learning_rate for x in leases["a"]][1:3] == [0, 0.0015]
    (tmp_path / "state").rename(tmp_path / "plain")
    coded, leases = trained_adapter(
        serve(*flags, "--uplink", "int8", "--downlink", "float16"), fleet
    )
    assert {x.uplink for x in leases["a"]} == {"int8"}
    assert plain.keys() == coded.keys()
    products = [n[:-6] for n in plain if n.endswith("lora_A")]
    for name in products:
        want, got = (v[f"{name}lora_B"] @ v[f"{name}lora_A"] for v in (plain, coded))
        assert np.linalg.norm(got - want) <= 0.05 * np.linalg.norm(want) + 1e-6, name


def test_control_variates_go_round(serve, fleet, tmp_path):
    flags = objective(tmp_path, scaffold=True, target_balance=0.01)
    server = serve("--rounds", "2", "--min-devices", "2", "--uplink", "int4", *flags)
    a, b = fleet(server.device("a")), fleet(server.device("b"))
    leases = run_all([a, b])
    assert leases["a"][1].objective.scaffold
    first, second = a.adapters[1], a.adapters[2]
    assert not any(n.startswith("scaffold.") for n in first)
    assert any(n.startswith("scaffold.") for n in second)
    assert second["trained_counts"].shape == (2, 4)
    assert second["trained_counts"].sum() == sum(
        len(held) for d in leases.values() for held in d[1].trained.values()
    )
    control = scaffold.read(server.state / "adapters", 2)
    assert {d for held in control.holders.values() for d in held} == {"a", "b"}
    for value in control.variates.values():  # every device said 0.1 twice
        assert 0.05 < np.abs(value).max() < 0.25


def test_an_objective_that_is_not_one(tmp_path, capsys):
    from server.__main__ import main

    path = tmp_path / "objective.json"
    for text, line in (
        ('{"proxx": 1}', "unknown key 'proxx', did you mean 'prox'?"),
        ('{"prox": -1}', "prox -1"),
        ('{"personal": true, "factors": "lora_A"}', "'both' wanted"),
        ("[", "not JSON"),
    ):
        path.write_text(text)
        assert (
            main(["--store", str(tmp_path), "--state", str(tmp_path), "--objective", str(path)])
            == 2
        )
        assert line in capsys.readouterr().err
