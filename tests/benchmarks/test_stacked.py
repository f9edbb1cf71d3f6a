"""FLoRA in the simulation: the exact average of the products, beside the base; what of it goes down."""

import dataclasses

import numpy as np
import pytest

from benchmarks.federated import methods, simulate, stacked
from edge.routed_torch import RoutedBackend
from protocol import lora, names, tensors
from server.aggregate import Aggregated
from tests.benchmarks import tiny_world

STACK = next(m for m in methods.ABLATIONS if m.name == "lora-stack")
PLAIN = dataclasses.replace(STACK, uplink="float32", downlink="float32")


@pytest.fixture(scope="module")
def world(artifact, tokenizer):
    base = tiny_world.base_of(artifact, tokenizer)
    return tiny_world.world_of(base, {name: tiny_world.rows(i) for i, name in enumerate("abc")})


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("profiles")


def products(contributions, prior=0.05):
    """(layer, expert, projection) -> weighted average of the trained products, each written out in float64."""
    tokens = {}
    for c in contributions:
        for key, n in c.trained_tokens.items():
            if n > 0:
                tokens.setdefault(key, []).append((c, n))
    nothing = prior * np.median([sum(n for _, n in found) for found in tokens.values()])
    averages = {}
    for (layer, expert), found in tokens.items():
        total = nothing + sum(n for _, n in found)
        for projection in ("gate_up", "down"):
            a, b = (names.lora(layer, expert, projection, f) for f in names.FACTORS)
            averages[layer, expert, projection] = sum(
                n / total * lora.SCALE * c.tensors[b].astype(np.float64) @ c.tensors[a]
                for c, n in found
            )
    return averages


def logits_of(run, session):
    batch = run.world.prompts.assemble(list(run.world.tasks["topics"].test[:4]), None)
    return session.logits(batch).numpy()


def global_logits(run):
    everyone = run.resident([list(range(run.experts))] * run.layers)
    session = run.session(run._even(run.experts), everyone, run.fleet.adapter)
    return logits_of(run, session)


def with_factors(run, change):
    """Logits of the plain base under LoRA of full rank: A is the identity, B the change itself."""
    rank, index = 64, run.index
    adapter = {n: v for n, v in run.fleet.adapter.items() if ".router." in n}
    for layer in index.moe_layers:
        for expert in range(run.experts):
            for projection in index.projections:
                out, into = index.features(projection)
                b = np.zeros((out, rank), np.float32)
                b[:, :into] = change.get((layer, expert, projection), 0) / lora.SCALE
                a, b_name = (names.lora(layer, expert, projection, f) for f in names.FACTORS)
                adapter |= {a: np.eye(rank, into, dtype=np.float32), b_name: b}
    everyone = run.resident([list(range(run.experts))] * run.layers)
    shape = run.world.shape([run.experts] * run.layers, rank)
    session = RoutedBackend().open_evaluate(run.base.artifact(shape), everyone)
    session.load(adapter)
    return logits_of(run, session)


def test_a_round_adds_the_average_of_the_products_and_nothing_else(world, cache, monkeypatch):
    run, seen = simulate.Run(world, PLAIN, cache), []
    combine = simulate.aggregate
    monkeypatch.setattr(
        simulate, "aggregate", lambda *given: seen.append(given[1]) or combine(*given)
    )
    before = global_logits(run)
    total = {}
    for number in (1, 2):
        run.train_round(number)
        for place, change in products(seen[-1]).items():
            total[place] = total.get(place, 0) + change
        assert run.stacks.dense.keys() == total.keys()
        for place, change in total.items():
            np.testing.assert_allclose(run.stacks.dense[place], change, atol=1e-6)
        after = global_logits(run)
        np.testing.assert_allclose(after, with_factors(run, total), atol=2e-5)
        assert np.abs(after - with_factors(run, {})).max() > 1e-3
        assert all(
            not v.any() for n, v in run.fleet.adapter.items() if n.endswith(names.FACTORS[1])
        )
    assert np.abs(after - before).max() > 1e-3
    # More than one client trained an expert, or the average would be none.
    assert any(
        sum(c.trained_tokens.get(k, 0) > 0 for c in seen[-1]) > 1
        for k in seen[-1][0].trained_tokens
    )


def test_a_client_starts_from_the_change(world, cache):
    """Its own sub-MoE has it too, and the experts that all sessions share do not."""
    run = simulate.Run(world, PLAIN, cache)
    run.train_round(1)
    resident = run.resident(run.choose(2)["a"])
    part = run.slice("a", resident)
    mine = logits_of(run, run.session(run.shapes["a"], resident, part))
    plain = RoutedBackend().open_evaluate(run.base.artifact(run.shapes["a"]), resident)
    plain.load(part)
    assert np.abs(mine - logits_of(run, plain)).max() > 1e-3
    for key, (up, down) in run.backend.body(run.base.artifact(run.shapes["a"])).experts.items():
        for shared, own in zip((up, down), plain.body.expert(*key), strict=True):
            np.testing.assert_array_equal(shared, own)


def test_all_have_the_change_as_it_is_sent(world, cache):
    """float16 on the way down: the server absorbs the rounded factors."""
    exact, narrow = (
        simulate.Run(world, m, cache)
        for m in (PLAIN, dataclasses.replace(PLAIN, downlink="float16"))
    )
    sizes = []
    for run in (exact, narrow):
        run.train_round(1)
        sizes.append(sum(sum(found.values()) for found in run.stacks.sizes.values()))
    assert 0.5 <= sizes[1] / sizes[0] < 0.65


def folded(layer, expert, rank, out=8, into=4):
    a, b = (names.lora(layer, expert, "up", f) for f in names.FACTORS)
    rng = np.random.default_rng(rank)
    adapter = {a: rng.normal(size=(rank, into)), b: rng.normal(size=(out, rank))}
    adapter = {n: np.float32(v) for n, v in adapter.items()}
    return Aggregated(adapter=adapter, prior_mass=0.0, holders={(layer, expert): 1})


def test_bytes_of_missed_rounds_by_hand():
    one = lambda rank: len(tensors.encode(folded(0, 1, rank).adapter))  # noqa: E731
    stacks = stacked.Stacks()
    assert stacks.sent("a", [(0, 1)]) == 0  # nothing was learnt yet
    stacks.absorb(folded(0, 1, 3), ("up",), rank=2, round=1)
    dense = 2 * 8 * 4
    stacks.sizes[0, 1][1] = dense - 10  # a small stack, so that it is worth sending
    assert stacks.sent("a", [(0, 1), (0, 2)]) == dense - 10
    assert stacks.sent("a", [(0, 1)]) == 0  # it has it
    stacks.absorb(folded(0, 1, 5), ("up",), rank=2, round=4)
    assert stacks.sizes[0, 1][4] == one(5) > dense
    assert (
        stacks.sent("a", [(0, 1)]) == dense
    )  # the change as a whole is smaller than round 4's factors
    stacks.sizes[0, 1][4] = 5
    assert stacks.sent("b", [(0, 1)]) == dense - 5  # both rounds
    assert stacks.sent("b", [(0, 1)]) == 0
    stacks.sizes[0, 1][4] = 11
    assert stacks.sent("c", [(0, 1)]) == dense  # both rounds would be one more


def test_lines_of_a_whole_run(world, cache):
    windows = np.random.default_rng(0).integers(0, 300, (4, 12))
    lines = list(simulate.run(world, STACK, cache, windows))
    assert [line["kind"] for line in lines][:: len(lines) - 1] == ["run", "end"]
    first, second = (line for line in lines if line["kind"] == "round")
    for line in (first, second):
        assert np.isfinite([line["loss_first"], line["loss_last"], line["factor_bias"]]).all()
        assert line["bytes_up"] > 0
    # Round 1 has router rows only to send, beside which every stack is large.
    assert second["bytes_down"] > 2 * first["bytes_down"]
    client = lines[0]["clients"]["a"]
    run = simulate.Run(world, STACK, cache)
    weights = 3 * 32 * 64
    plain = run.predicted(run.shapes["a"], changed=False)
    assert client["predicted_bytes"] - plain == 2 * weights * client["experts"]
    ours = simulate.Run(world, methods.OURS, cache)
    assert run.room == ours.room  # as many experts as the other rules
