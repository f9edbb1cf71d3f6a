"""Every method of the scoreboard on a tiny base: three tasks at once, unequal budgets, devices that fail."""

import dataclasses
import random
import re

import numpy as np
import pytest

from benchmarks.federated import baselines, methods, partitions, simulate
from benchmarks.federated.suites import Suite
from benchmarks.federated.tasks import TaskData
from benchmarks.federated.world import Base, World
from edge import data
from edge.data import Row
from edge.session import Terms
from export import costs
from protocol import names
from protocol.messages import Task
from tests.edge.conftest import TOPICS

SUITE = Suite(
    name="tiny", number=98, tasks=("a", "b", "c"), setting="enforced-t", clients=6, rounds=2, per_round=5,
    steps=2, batch=4, sequence=32, answers=2, rows_each=None, held_back=4, validation=2, test=2,
)  # fmt: skip
EVERY = {m.name: m for m in (*methods.METHODS.values(), *methods.ABLATIONS, *methods.UPLINK)}


def rows(seed, count):
    rng = random.Random(seed)
    words = {label: text.split() for label, text in TOPICS.items()}
    labels = [rng.choice(sorted(TOPICS)) for _ in range(count)]
    return tuple(Row(" ".join(rng.sample(words[x], 5)), x) for x in labels)


def task(name, seed):
    train = rows(seed, 40)
    return TaskData(
        name=name, metric="f1", labels=(), train=train, groups=tuple(r.label for r in train),
        validation=rows(seed + 1, 2), test=rows(seed + 2, 2),
    )  # fmt: skip


@pytest.fixture(scope="module")
def world(artifact, tokenizer):
    """Six clients, two of each of three tasks, with 15 to 50 % of the experts."""
    base = Base(artifact.base, artifact.blobs, tokenizer, costs.dense_of(artifact.base))
    found = {name: task(name, 10 * i) for i, name in enumerate(SUITE.tasks)}
    rng = np.random.default_rng(0)
    groups = {name: t.groups for name, t in found.items()}
    clients = partitions.fedmoe(groups, SUITE.setting, rng, clients=SUITE.clients)
    budgets = partitions.budgets(clients, rng)
    prompts = data.prompter(
        tokenizer, Task(template="{text}", answer="text"), SUITE.batch, SUITE.sequence, SUITE.answers, base.index
    )  # fmt: skip
    return World(SUITE, 0, base, found, tuple(clients), budgets, prompts)


def begun(world, method, tmp_path, **suite):
    world = dataclasses.replace(world, suite=dataclasses.replace(world.suite, **suite))
    return simulate.Run(world, method, tmp_path / "cache")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("profiles")


@pytest.mark.parametrize("name", EVERY)
def test_every_method_runs_a_round_of_three_tasks(world, cache, name):
    run = begun(world, EVERY[name], cache)
    before = dict(run.fleet.adapter)
    line = run.train_round(1)
    tasks = {run.clients[c].tasks[0] for c in line["clients"]}
    assert tasks == set(SUITE.tasks)
    assert np.isfinite(line["loss_first"])
    assert np.isfinite(line["loss_last"])
    assert 0 < line["bytes_up"]
    changed = {n for n, v in run.fleet.adapter.items() if (v != before[n]).any()}
    assert changed
    assert run.fleet.adapter.keys() == before.keys()
    if EVERY[name].trains == "experts":
        # Only what somebody held has changed.
        held = {
            (layer, e)
            for client in line["clients"]
            for layer, ids in run.resident(run.fleet.former[client]).items()
            for e in ids
        }
        assert {(p.layer, p.expert) for p in map(names.parse, changed)} <= held
        assert 0 < line["routing_consistency"] <= 1
    if EVERY[name].over_budget:
        return
    for client in run.clients:
        # As many experts as a token needs are the least there is.
        least = run.room[client] == run.index.top_k * run.layers
        assert least or run.predicted(run.shapes[client]) <= world.budget_bytes(client)


def test_the_baselines_differ_by_what_they_are(world, cache):
    fedprox, scaffold, random_ = (EVERY[n] for n in ("fedprox", "scaffold", "random"))
    assert fedprox.objective.prox > 0
    one, other = (begun(world, m, cache).choose(1) for m in (random_, EVERY["fedit"]))
    assert one != other
    run = begun(world, scaffold, cache)
    run.train_round(1)
    assert run.fleet.control.variates


def test_stages_can_be_left_out(world, cache):
    """Without stage 1 the base's own routing chooses, without stage 2 no client has a structure."""
    with_both = begun(world, EVERY["fedmoe"], cache)
    without_one = begun(world, EVERY["fedmoe-without-stage-1"], cache)
    without_two = begun(world, EVERY["fedmoe-without-stage-2"], cache)
    assert not without_one.stats
    for value in without_one.fleet.values.values():
        np.testing.assert_array_equal(value, without_one.prior)
    assert with_both.stats
    assert any((v != with_both.prior).any() for v in with_both.fleet.values.values())
    for run in (with_both, without_two):
        run.train_round(1)
    assert with_both.fleet.structures
    assert not without_two.fleet.structures


def test_who_fails_is_counted_and_changes_nothing(world, cache):
    ours = EVERY["ours"]
    calm, all_gone = (begun(world, ours, cache, failures=rate) for rate in (0.0, 1.0))
    some = begun(world, ours, cache, failures=0.5, setting="labels")
    before = dict(all_gone.fleet.adapter)
    line = all_gone.train_round(1)
    assert line["failed"] == line["clients"]
    assert (line["bytes_up"], line["trained_experts"], line["loss_last"]) == (0, 0, None)
    assert line["bytes_down"] > 0  # they were sent their leases
    assert all(all_gone.fleet.adapter[n] is v for n, v in before.items())
    line, plain = some.train_round(1), calm.train_round(1)
    assert 0 < len(line["failed"]) < len(line["clients"])
    assert not plain["failed"]
    assert plain["trained_experts"] > 0


def test_budgets_differ_and_adapter_experts_have_one_shape(world, cache):
    """FFT-MoE: whatever a client's budget and number of active experts, its update has the shape of all others."""
    run = begun(world, EVERY["fft-moe"], cache, setting="labels", per_round=6)
    slots = {name: len(shape.slots[0]) for name, shape in run.shapes.items()}
    assert len(set(world.budgets.values())) == 6
    few = {name for name in run.clients if world.budgets[name] < 0.25}
    assert few
    active = {name: 1 if name in few else 2 for name in run.clients}
    run.objective = lambda client, round: dataclasses.replace(
        run.method.objective, active=active[client]
    )
    sent = []
    uploaded = run.uploaded
    run.uploaded = lambda *given: sent.append(uploaded(*given)) or sent[-1]
    before = dict(run.fleet.adapter)
    line = run.train_round(1)
    assert len(sent) == len(line["clients"]) == len(slots)
    shapes = [{n: v.shape for n, v in adapter.items()} for adapter, _ in sent]
    assert all(s == shapes[0] == {n: v.shape for n, v in before.items()} for s in shapes)
    key = names.lora(0, 0, "adapter", "lora_B")
    mean = sum(len(run.rows[c]) * a[key] for c, (a, _) in zip(line["clients"], sent, strict=True))
    np.testing.assert_allclose(
        run.fleet.adapter[key], mean / sum(len(run.rows[c]) for c in line["clients"]), atol=1e-6
    )


def test_small_budgets_activate_fewer_experts(world, cache):
    run = begun(world, EVERY["flame"], cache)
    active = {name: run.objective(name, 1).active for name in run.clients}
    assert active == {name: int(share < 0.25) for name, share in world.budgets.items()}
    assert set(active.values()) == {0, 1}  # 0: as many as the base does
    assert run.objective("c00", 1).output_scale


def test_a_gate_of_its_own_is_trained_and_fewer_active_experts_weigh_as_much(world, cache):
    run = begun(world, EVERY["fft-moe"], cache)
    resident = run.resident(run.choose(1)["c00"])
    run.own.frozen = resident
    session = run.own.open_train(run.base.artifact(run.shapes["c00"]), run.trains(resident))
    rng = np.random.default_rng(1)
    adapter = {n: np.float32(rng.normal(0, 0.1, v.shape)) for n, v in run.fleet.adapter.items()}
    session.load(adapter)
    batch = run.prompts["c00"].assemble(run.rows["c00"][:4], None)
    for active in (1, 2):
        _, routed = session.forward_backward(batch, Terms(active=active))
        for counts in routed.values():
            assert counts.sum() == active * batch.valid.sum()
    gates = [g for n, g in session.gradients().items() if ".router." in n]
    assert len(gates) == baselines.ADAPTERS * run.layers
    assert all(np.abs(g).max() > 1e-6 for g in gates)
    # If all experts are alike, it does not matter how many of them answer: their weights sum to 1.
    for n in adapter:
        if ".experts." in n:
            adapter[n] = adapter[re.sub(r"experts\.\d+", "experts.0", n)]
    session.load(adapter)
    one, two = (session.logits(batch, Terms(active=k)).numpy() for k in (1, 2))
    np.testing.assert_allclose(one, two, atol=1e-5)
