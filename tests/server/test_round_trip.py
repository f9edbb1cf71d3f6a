"""Whole runs: the real server process, a real broker, devices that speak the real protocol."""

import json
import threading

import numpy as np
import pytest
from safetensors.numpy import load_file


def run_all(devices):
    """Each device in its own thread until the run is over."""
    results, failures = {}, []

    def live(device):
        try:
            results[device.device] = device.work_until_over()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=live, args=(d,)) for d in devices]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    return results


@pytest.mark.parametrize("broker", ["mosquitto", "amqtt"])
def test_a_run_ends_with_an_adapter(serve, fleet, broker):
    server = serve("--broker", broker, "--rounds", "2", "--min-devices", "3")
    devices = [
        fleet(server.device("a")), fleet(server.device("b")), fleet(server.device("c", "large")),
    ]  # fmt: skip
    leases = run_all(devices)
    works = ["profile", "train", "train", "evaluate"]
    assert [[x.work for x in v] for v in leases.values()] == [works] * 3
    status = json.loads(devices[0].get("/v1/run"))
    assert (status["state"], status["version"], status["mean_accuracy"]) == ("over", 2, 0.5)
    assert status["devices"]["c"]["slots"] == [
        {"int8/2": 1, "int4/2": 1, "int4/0": 1}, {"int8/2": 2, "int4/1": 1, "int4/0": 1},
    ]  # fmt: skip
    c = leases["c"][1]
    assert {layer: len(held) for layer, held in c.resident.items()} == {"0": 3, "1": 4}
    assert c.trained == {layer: held[:-1] for layer, held in c.resident.items()}
    history = [
        json.loads(line) for line in (server.state / "history.jsonl").read_text().splitlines()
    ]
    assert [(h["round"], h["work"], h["version"], h["closed_by"]) for h in history] == [
        (0, "profile", 0, "all"), (1, "train", 1, "all"), (2, "train", 2, "all"), (3, "evaluate", 2, "all"),
    ]  # fmt: skip
    assert all(len(h["devices"]) == 3 and not h["missing"] for h in history)
    assert np.sum(history[1]["coverage"]) == 2 + 2 + 2 + 2 + 3 + 4
    consistency = history[1]["aggregation"]["routing_consistency"]
    assert consistency.keys() == {"a", "b", "c"}
    assert all(0 < r <= 1 for r in consistency.values())
    first = load_file(server.state / "adapters" / "0" / "adapter.safetensors")
    last = load_file(server.state / "adapters" / "2" / "adapter.safetensors")
    assert first.keys() == last.keys()
    assert all(np.isfinite(v).all() for v in last.values())
    assert any((first[k] != last[k]).any() for k in first)
    assert (server.state / "adapters" / "2" / "adapter_config.json").exists()
    server.stop()
    assert server.process.returncode == 0


def test_a_run_by_other_rules_of_selection(serve, fleet):
    cap = 1100  # two experts of rank 2: 4 * (2 * (16 + 16 + 16 + 8) + 16) bytes each
    server = serve(
        "--broker", "amqtt", "--rounds", "2", "--min-devices", "3", "--strategy", "history",
        "--relevance", "frequency", "--beta", "0", "--uplink-bytes", str(cap),
    )  # fmt: skip
    devices = [
        fleet(server.device("a")), fleet(server.device("b")), fleet(server.device("c", "large")),
    ]  # fmt: skip
    leases = run_all(devices)
    for device in leases.values():
        for lease in device[1:3]:
            assert sum(len(trained) for trained in lease.trained.values()) == 2
            assert all(set(t) <= set(lease.resident[layer]) for layer, t in lease.trained.items())
    assert json.loads(devices[0].get("/v1/run"))["version"] == 2
