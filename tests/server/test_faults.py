"""What goes wrong in the field, against a real server process and a real Mosquitto."""

import json
import os
import re
import signal
import time
from dataclasses import replace

import numpy as np
import pytest

from protocol import chunks, messages, topics, update
from protocol.messages import Lease, Ready, Receipt, RunOver
from server import adapters
from server.aggregate import aggregate
from server.contribution import Contribution
from tests.server.fake_device import FACTS, FakeDevice, made_up_stats, made_up_tensors
from tests.server.test_round_trip import run_all
from tests.server.tiny_store import RANK

SMALL_CHUNKS = ("--chunk-bytes", "1024")


@pytest.fixture
def serve(serve):
    """Updates as they are: their numbers are compared with what devices made up, and they fill several chunks."""
    return lambda *flags: serve("--uplink", "float32", "--downlink", "float32", *flags)


def leases_of(*devices):
    """A lease for each; a round opens when all are there, so everyone speaks before anyone waits."""
    for device in devices:
        device.ready()
    return [device.lease() for device in devices]


def profiled(*devices):
    """Take everyone through the profile round."""
    leases = leases_of(*devices)
    for device, lease in zip(devices, leases, strict=True):
        assert lease.work == "profile"
        assert device.deliver(lease, device.made_up_update(lease)).accepted


def history(server):
    return [json.loads(line) for line in (server.state / "history.jsonl").read_text().splitlines()]


def wait_for(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError("not within the time")


def on_disk(server):
    return sum(p.read_bytes().count(1) for p in (server.state / "uploads").glob("*.have"))


def expected_version_1(devices, leases):
    """What aggregation of these made-up updates must give."""
    base = devices[0].base
    made = []
    for device, lease in zip(devices, leases, strict=True):
        tokens = made_up_stats(lease, base, FACTS.tokens, device.seed)["trained_tokens"]
        weights = {
            (base.moe_layers[i], int(e)): float(tokens[i, e])
            for i, e in zip(*np.nonzero(tokens), strict=True)
        }
        made.append(
            Contribution(
                device=device.device,
                tensors=made_up_tensors(lease, base, device.shape, device.seed),
                trained_tokens=weights,
            )
        )
    return aggregate(adapters.fresh(base, RANK), made, base.projections).adapter


def test_a_killed_server_goes_on_and_counts_nothing_twice(serve, fleet):
    server = serve("--rounds", "1", "--min-devices", "2", *SMALL_CHUNKS)
    a, b = fleet(server.device("a")), fleet(server.device("b", "large"))
    profiled(a, b)
    leases = leases_of(a, b)
    updates = [a.made_up_update(leases[0]), b.made_up_update(leases[1])]
    assert a.deliver(leases[0], updates[0]).accepted
    grant = b.grant(leases[1], updates[1])
    total = chunks.count(len(updates[1]), 1024)
    for index in range(0, total, 2):
        b.send_chunk(grant, updates[1], index)
    wait_for(lambda: on_disk(server) == (total + 1) // 2)
    broker = server.broker
    server.kill()
    server.start()
    assert server.broker == broker
    a.url = b.url = server.url
    # The new process asks for exactly what is missing.
    receipt = b.wait(Receipt, lambda r: r.missing)
    assert receipt.missing == tuple(range(1, total, 2))
    for index in receipt.missing:
        b.send_chunk(grant, updates[1], index)
    # The old update again: accepted, already.
    a.say(a.offer(leases[0], updates[0]))
    assert a.wait(Receipt, lambda r: r.final).accepted
    assert b.wait(Receipt, lambda r: r.final).accepted
    run_all([a, b])
    rounds = history(server)
    assert [h["round"] for h in rounds] == [0, 1, 2]
    assert rounds[1]["devices"].keys() == {"a", "b"}
    assert rounds[1]["devices"]["b"]["bytes_up"] == len(updates[1])
    wanted = expected_version_1([a, b], leases)
    got = adapters.read_version(server.state / "adapters", 1)
    assert all(np.array_equal(got[k], wanted[k]) for k in wanted)


def test_a_server_killed_while_closing_closes_once(serve, fleet):
    """Kill at many moments; whatever was going on, the run ends with each round once."""
    server = serve("--rounds", "3", "--min-devices", "1")
    device = fleet(server.device("a"))
    profiled(device)
    for moment in (0.0, 0.02, 0.05):
        lease = device.lease()
        if isinstance(lease, RunOver):
            break
        data = device.made_up_update(lease)
        assert device.deliver(lease, data).accepted
        time.sleep(moment)
        server.kill()
        server.start()
        device.url = server.url
        assert device.deliver(lease, data).accepted  # still, or already
    device.work_until_over()
    rounds = history(server)
    assert [(h["round"], h["version"]) for h in rounds] == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 3)]
    assert all(len(h["devices"]) == 1 for h in rounds)


def test_the_broker_restarts(serve, fleet):
    server = serve("--rounds", "1", "--min-devices", "1", "--broker", "mosquitto", *SMALL_CHUNKS)
    device = fleet(server.device("a"))
    profiled(device)
    lease = device.lease()
    data = device.made_up_update(lease)
    grant = device.grant(lease, data)
    device.send_chunk(grant, data, 0)
    wait_for(lambda: on_disk(server) == 1)
    pid = int(re.search(r"mosquitto on \S+ pid=(\d+)", "\n".join(server.lines))[1])
    os.kill(pid, signal.SIGKILL)
    server.wait_line("the broker died with code -9, starting it again")
    assert device.final(lease, data, grant).accepted
    assert [x.work for x in device.work_until_over()] == ["evaluate"]
    assert server.process.poll() is None


def test_the_broker_dies_with_a_killed_server(serve):
    server = serve("--broker", "mosquitto")
    pid = int(re.search(r"pid=(\d+)", server.wait_line(r"mosquitto on"))[1])
    server.kill()
    wait_for(lambda: not os.path.exists(f"/proc/{pid}"))


def bad_updates(device: FakeDevice, lease: Lease):
    """Name of the fault -> (bytes, reason)."""
    tensors = made_up_tensors(lease, device.base, device.shape, 1)
    stats = made_up_stats(lease, device.base, FACTS.tokens, 1)
    name = next(iter(sorted(tensors)))
    nan = {**tensors, name: np.full_like(tensors[name], np.nan)}
    renamed = {k.replace("layers.0", "layers.5"): v for k, v in tensors.items()}
    padded = {**tensors, "padding": np.zeros(10**5, np.float32)}
    return {
        "nan": (update.pack(nan, stats, FACTS), f"{name}: NaN or infinity"),
        "names": (update.pack(renamed, stats, FACTS), "tensors not asked for, first: 'layers.5"),
        "large": (update.pack(padded, stats, FACTS), r"update of \d+ bytes, at most \d+ wanted"),
        "noise": (os.urandom(5000), "safetensors header of"),
    }


def test_bad_updates_cost_one_line_each_and_the_run_goes_on(serve, fleet):
    server = serve("--rounds", "1", "--min-devices", "5", *SMALL_CHUNKS)
    good = fleet(server.device("good"))
    bad = {name: fleet(server.device(name)) for name in ("nan", "names", "large", "noise")}
    profiled(good, *bad.values())
    lease, *others = leases_of(good, *bad.values())
    for (name, device), its in zip(bad.items(), others, strict=True):
        data, reason = bad_updates(device, its)[name]
        receipt = device.deliver(its, data)
        assert not receipt.accepted
        assert re.search(reason, receipt.reason)
        again = device.deliver(its, data)  # asking again gives the same answer
        assert (again.final, again.accepted, again.reason) == (True, False, receipt.reason)
    assert good.deliver(lease, good.made_up_update(lease)).accepted
    run_all([good, *bad.values()])
    rounds = history(server)
    assert rounds[1]["closed_by"] == "all"
    assert rounds[1]["devices"].keys() == {"good"}
    assert sorted(r["device"] for r in rounds[1]["rejected"]) == sorted(bad)
    for name in bad:
        lines = [x for x in server.lines if re.search(f"device={name} refused", x)]
        assert len(lines) == 1, lines
    wanted = expected_version_1([good], [lease])
    got = adapters.read_version(server.state / "adapters", 1)
    assert all(np.array_equal(got[k], wanted[k]) for k in wanted)


def test_malformed_messages_are_named_and_ignored(serve, fleet):
    server = serve("--rounds", "0", "--min-devices", "2", *SMALL_CHUNKS)
    a, b = fleet(server.device("a")), fleet(server.device("b"))
    up = topics.up_ctl("home", "a")
    a.raw(up, b"{")
    a.raw(up, b'{"kind": "dance"}')
    a.raw(up, b"x" * 70_000)
    a.raw(up, messages.encode(Ready(device="b", run=a.welcome.run)))
    a.raw(up, messages.encode(Ready(device="a", run="another")))
    a.raw(topics.up_ctl("home", "stranger"), messages.encode(Ready(device="stranger", run="r")))
    a.raw(topics.up_chunk("home", "a", "nothing", 0), b"noise that is longer than a header")
    a.raw("fl/v1/home/a/up/../../x", b"")
    for pattern in (
        "device=a refused: message is not JSON",
        "device=a refused: message of unknown kind 'dance'",
        "device=a refused: message of 70000 bytes, at most 65536 wanted",
        "device=a refused: ready that names another device",
        "device=a refused: ready for run 'another'",
        "device=stranger refused: not registered",
        "device=a refused: wrong magic",
    ):
        server.wait_line(pattern)
    leases = leases_of(a, b)
    data = b.made_up_update(leases[1])
    # Somebody else's lease, an unknown one, a wrong signature: an answer each, and nothing is lost.
    for wrong, reason in (
        ({"lease": leases[0].lease}, "unknown lease"),
        ({"lease": "never"}, "unknown lease"),
        ({"mac": "0" * 64}, "wrong signature"),
    ):
        b.say(replace(b.offer(leases[1], data), **wrong))
        receipt = b.wait(Receipt)
        assert (receipt.final, receipt.accepted, receipt.reason) == (True, False, reason)
    # Chunks under a grant of another device, with a wrong count, under a wrong index.
    grant = b.grant(leases[1], data)
    a.raw(topics.up_chunk("home", "a", grant.xfer, 0), chunks.cut(data, 0, 1024))
    b.raw(topics.up_chunk("home", "b", grant.xfer, 0), chunks.cut(data, 0, 512))
    b.raw(topics.up_chunk("home", "b", grant.xfer, 1), chunks.cut(data, 0, 1024))
    b.raw(topics.up_chunk("home", "b", grant.xfer, 0), chunks.cut(data, 0, 1024)[:-1] + b"!")
    for pattern in (
        "was granted to another device",
        "granted",
        "on the topic of chunk 1",
        "checksum",
    ):
        server.wait_line(pattern)
    assert b.deliver(leases[1], data).accepted
    assert a.deliver(leases[0], a.made_up_update(leases[0])).accepted
    reasons = [r["reason"] for r in json.loads(a.get("/v1/run"))["rejected"]]
    assert "message of unknown kind 'dance'" in reasons
    run_all([a, b])


def test_duplicates_are_harmless(serve, fleet):
    server = serve("--rounds", "0", "--min-devices", "2", *SMALL_CHUNKS)
    device, other = fleet(server.device("a")), fleet(server.device("b"))
    other.ready()
    lease = device.lease()
    for _ in range(3):
        device.ready()
    assert device.wait(Lease).lease == lease.lease
    data = device.made_up_update(lease)
    for _ in range(3):
        device.say(device.offer(lease, data))
    grant = device.grant(lease, data)
    for index in reversed(range(chunks.count(len(data), 1024))):
        for _ in range(2):
            device.send_chunk(grant, data, index)
    assert device.final(lease, data, grant).accepted
    assert device.deliver(lease, data).accepted  # once more from the start
    lease = other.lease()
    assert other.deliver(lease, other.made_up_update(lease)).accepted
    run_all([device, other])
    assert [len(h["devices"]) for h in history(server)] == [2, 2]


def test_content_that_differs_from_its_hash_is_asked_for_once_more(serve, fleet):
    server = serve("--rounds", "0", *SMALL_CHUNKS)
    device = fleet(server.device("a"))
    lease = device.lease()
    data = device.made_up_update(lease)
    grant = device.grant(lease, data)
    device.send_chunk(grant, bytes(len(data)), 0)
    for index in range(1, chunks.count(len(data), 1024)):
        device.send_chunk(grant, data, index)
    assert device.final(lease, data, grant).accepted
    server.wait_line("device=a upload differs from its hash")


def test_a_device_vanishes_and_comes_back(serve, fleet):
    server = serve("--rounds", "2", "--min-devices", "2", "--deadline", "3")
    a, b = fleet(server.device("a")), fleet(server.device("b"))
    profiled(a, b)
    first, lost = leases_of(a, b)
    assert a.deliver(first, a.made_up_update(first)).accepted
    b.vanish()
    wait_for(lambda: json.loads(a.get("/v1/run"))["devices"]["b"]["state"] == "offline")
    second = a.lease()  # round 1 is closed by its deadline, round 2 opens with a alone
    assert second.round == 2
    rounds = history(server)
    assert (rounds[1]["closed_by"], rounds[1]["missing"]) == ("deadline", ["b"])
    back = fleet_again(fleet, server, b)
    receipt = back.deliver(lost, back.made_up_update(lost))
    assert (receipt.final, receipt.accepted, receipt.reason) == (True, False, "stale")
    back.ready()
    time.sleep(0.3)
    assert a.deliver(second, a.made_up_update(second)).accepted
    last = run_all([a, back])
    assert [x.work for x in last["b"]] == ["evaluate"]


def fleet_again(fleet, server, device):
    back = server.device(device.device, device.profile)
    back.register(device.welcome.token)
    back.connect()
    return back


def test_a_device_that_returns_in_time_gets_the_same_lease(serve, fleet):
    server = serve("--rounds", "1", "--min-devices", "1")
    device = fleet(server.device("a"))
    profiled(device)
    lease = device.lease()
    device.vanish()
    back = fleet_again(fleet, server, device)
    again = back.lease()
    assert (again.lease, again.nonce, again.adapter) == (lease.lease, lease.nonce, lease.adapter)
    assert again.seconds < lease.seconds
    assert back.deliver(again, back.made_up_update(again)).accepted
    back.work_until_over()
    back.stop()


def test_a_round_that_nobody_answers_is_extended_once(serve, fleet):
    server = serve("--rounds", "1", "--min-devices", "1", "--deadline", "1")
    device = fleet(server.device("a"))
    profiled(device)
    device.lease()
    line = server.wait_line("round=1 train closed by deadline: 0 of 1 devices, version 0")
    assert 1.9 < float(re.search(r"([\d.]+) s$", line)[1]) < 4
    assert isinstance(lease := device.lease(), Lease)
    assert lease.work == "evaluate"
    device.work_until_over()


def test_uploads_under_way_are_bounded(serve, fleet):
    server = serve("--rounds", "0", "--min-devices", "2", "--upload-budget", "1", *SMALL_CHUNKS)
    a, b = fleet(server.device("a")), fleet(server.device("b"))
    leases = leases_of(a, b)
    updates = [a.made_up_update(leases[0]), b.made_up_update(leases[1])]
    grant = a.grant(leases[0], updates[0])
    b.patience = 2.0
    with pytest.raises(TimeoutError):
        b.grant(leases[1], updates[1])
    b.patience = 60.0
    for index in range(chunks.count(len(updates[0]), 1024)):
        a.send_chunk(grant, updates[0], index)
    assert a.final(leases[0], updates[0], grant).accepted
    assert b.deliver(leases[1], updates[1]).accepted
    run_all([a, b])


def test_it_ends_when_the_run_is_over(serve, fleet):
    server = serve("--rounds", "0", "--exit-when-done")
    device = fleet(server.device("a"))
    device.work_until_over()
    device.stop()
    assert server.process.wait(10) == 0
