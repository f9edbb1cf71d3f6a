"""Absent experts on the tiny base: a twin or a merge of one is as good as the expert, which masking is not."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from benchmarks import stand_in
from benchmarks.federated.tasks import TaskError
from edge.routed_torch import RoutedBackend
from server import stand_in as rules
from tests.benchmarks import tiny_world

LAYERS, EXPERTS = 2, 6
WINDOWS = np.random.default_rng(0).integers(0, 300, (4, 12))
WITHOUT_3 = [[5, 1, 0, 2, 4], [0, 4, 1, 2, 5]]  # in slot order


@pytest.fixture(scope="module")
def world(artifact, tokenizer):
    base = tiny_world.base_of(artifact, tokenizer)
    return tiny_world.world_of(base, {name: tiny_world.rows(i) for i, name in enumerate("ab")})


@pytest.fixture
def backend():
    return stand_in.StandInBackend()


def stats():
    rng = np.random.default_rng(1)
    names = ("top", "output_norm")
    return {name: np.float32(rng.random((LAYERS, EXPERTS)) + 0.1) for name in names}


def states_of(backend, world, way, held, alike, value=None):
    value = np.ones((LAYERS, EXPERTS)) if value is None else value
    session = stand_in.open_way(backend, world, way, held, alike, value, stats())
    return stand_in.states(session, world, tiny_world.rows(7, 8))


def whole(backend, world):
    session = stand_in.opened(backend, world, stand_in.everyone(world))
    return stand_in.states(session, world, tiny_world.rows(7, 8))


def made_twins(backend, world):
    """Expert 3 of every layer becomes expert 1, with its router row left alone."""
    session = stand_in.opened(backend, world, stand_in.everyone(world))
    for position in range(LAYERS):
        twin = session.body.expert(position, 1, "int4")
        session.body.experts[position, 3, "int4"] = twin


def off(one, other):
    return float((one[0] - other[0]).norm(dim=-1).mean())


def test_masking_is_what_devices_do(world, backend):
    session = stand_in.opened(backend, world, WITHOUT_3)
    ours = stand_in.states(session, world, tiny_world.rows(7, 8))
    plain = RoutedBackend().open_evaluate(session.body.artifact, session.resident)
    theirs = stand_in.states(plain, world, tiny_world.rows(7, 8))
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=0)
    assert off(ours, whole(backend, world)) > 1e-3


@pytest.mark.parametrize("way", ["nearest", "reroute"])
def test_a_map_of_experts_onto_themselves_changes_nothing(world, backend, way):
    alike = stand_in.likeness(backend, world, WINDOWS)
    shuffled = [[3, 1, 0, 2, 4, 5], [5, 4, 3, 2, 1, 0]]
    found = states_of(backend, world, way, shuffled, alike)
    torch.testing.assert_close(found[0], whole(backend, world)[0], atol=1e-5, rtol=1e-5)


def test_an_absent_expert_with_a_resident_twin_is_not_missed(world, backend):
    made_twins(backend, world)
    alike = stand_in.likeness(backend, world, WINDOWS)
    for cosine in alike:
        assert cosine[3, 1] == pytest.approx(1)
        assert np.sort(cosine[3])[-3] < 0.99
    full = whole(backend, world)
    found = states_of(backend, world, "nearest", WITHOUT_3, alike)
    torch.testing.assert_close(found[1], full[1], atol=1e-5, rtol=1e-5)
    assert off(states_of(backend, world, "masking", WITHOUT_3, alike), full) > 1e-3


def test_weights_that_move_first(world, backend):
    """`reroute` is the server's own rule, then the heaviest slots."""
    alike = stand_in.likeness(backend, world, WINDOWS)
    held = [[2, 0, 4], [1, 5, 3]]
    session = stand_in.open_way(
        backend, world, "reroute", held, alike, np.ones((LAYERS, EXPERTS)), stats()
    )
    block = stand_in.blocks_of(session)[0]
    block.heard, taken = [], []
    experts = block._experts
    block._experts = lambda x, weight, slot, *rest: (
        taken.append((weight, slot)) or experts(x, weight, slot, *rest)
    )
    stand_in.states(session, world, tiny_world.rows(7, 4))
    g = (block.heard[0] @ block.router.t()).softmax(-1).double().numpy()
    moved = rules.reroute(g, rules.nearest(alike[0], held[0]), 3)
    wanted = np.sort(moved, 1)[:, ::-1][:, : block.top_k]
    if block.renormalise:
        wanted = wanted / wanted.sum(1, keepdims=True)
    np.testing.assert_allclose(taken[0][0].numpy(), wanted, atol=1e-6)
    np.testing.assert_array_equal(taken[0][1][:, 0].numpy(), moved.argmax(1))


def test_a_merge_of_one_expert_is_that_expert(world, backend):
    """But for what packing it again into 4 bits rounds."""
    alike = stand_in.likeness(backend, world, WINDOWS)
    full = whole(backend, world)
    masked = off(states_of(backend, world, "masking", WITHOUT_3, alike), full)
    assert off(states_of(backend, world, "merged", WITHOUT_3, alike), full) < masked / 20


def test_a_merge_stands_for_the_weight_of_all_that_are_equal(world, backend):
    """Three equal absent experts draw three times the weight of one; without the bias they would not."""
    session = stand_in.opened(backend, world, stand_in.everyone(world))
    for position, block in enumerate(stand_in.blocks_of(session)):
        for expert in (4, 5):
            session.body.experts[position, expert, "int4"] = session.body.expert(
                position, 3, "int4"
            )
            block.router[expert] = block.router[3]
    even = {"top": np.ones((LAYERS, EXPERTS)), "output_norm": np.ones((LAYERS, EXPERTS))}
    session = stand_in.open_way(
        backend, world, "merged", [[0, 1, 2]] * LAYERS, [], np.ones((LAYERS, EXPERTS)), even
    )
    for position, block in enumerate(stand_in.blocks_of(session)):
        assert block.bias.tolist() == pytest.approx([0, 0, 0, np.log(3)])
        torch.testing.assert_close(block.rows[3], block.router[3])
        up, down = session.body.expert(position, 3, "int4")
        torch.testing.assert_close(block.frozen[0][3], up, atol=2e-3, rtol=0.05)
        torch.testing.assert_close(block.frozen[1][3], down, atol=2e-3, rtol=0.05)


def test_a_merge_is_the_average_by_use(world, backend):
    """Of weights and router rows, over the absent experts 3, 4 and 5, used 1 : 2 : 1 and as loud as 1 : 1 : 4."""
    share = np.array([0, 0, 0, 1, 2, 4]) / 7
    used = np.tile([9.0, 9, 9, 1, 2, 1], (LAYERS, 1))
    heard = {"top": used, "output_norm": used * [1, 1, 1, 1, 1, 4]}
    session = stand_in.open_way(
        backend, world, "merged", [[0, 1, 2]] * LAYERS, [], np.ones((LAYERS, EXPERTS)), heard
    )
    for position, block in enumerate(stand_in.blocks_of(session)):
        row = sum(w * block.router[e] for e, w in enumerate(share))
        torch.testing.assert_close(block.rows[3], row.float(), atol=1e-6, rtol=1e-5)
        assert block.bias[3] == pytest.approx(-sum(w * np.log(w) for w in share[3:]))
        for i, weights in enumerate(block.frozen):
            mean = sum(w * session.body.expert(position, e, "int4")[i] for e, w in enumerate(share))
            rounding = (weights[3] - mean).norm() / mean.norm()
            assert 0 < rounding < 0.12  # 4 bits
        assert (block.frozen[0][3] - session.body.expert(position, 3, "int4")[0]).norm() > 0.1


def test_as_much_memory_as_the_others(world, backend):
    value = np.tile(np.arange(EXPERTS), (LAYERS, 1))
    held = [[2, 0, 4], [5, 1, 3]]
    sizes = {}
    for way in stand_in.WAYS:
        alike = stand_in.likeness(backend, world, WINDOWS)
        session = stand_in.open_way(backend, world, way, held, alike, value, stats())
        sizes[way] = [len(block.ids) for block in stand_in.blocks_of(session)]
        if way == "merged-even":
            assert [b.ids[:2] for b in stand_in.blocks_of(session)] == [[2, 4], [5, 3]]
    assert sizes == {**dict.fromkeys(stand_in.WAYS, [3, 3]), "merged": [4, 4]}
    # The next session masks again.
    stand_in.opened(backend, world, held)
    assert all(b.slot is None and b.bias is None for b in stand_in.blocks_of(session))


def test_lines_and_table(world, backend, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stand_in.worlds, "open_base", lambda *given: world.base)
    monkeypatch.setattr(stand_in.tasks, "heldout_text", lambda *given: np.repeat(WINDOWS, 4, 0))
    monkeypatch.setattr(
        stand_in.worlds, "make", lambda suite, seed, *rest: dataclasses.replace(world, seed=seed)
    )
    given = ["--data", str(tmp_path), "--work", str(tmp_path), "--shares", "0.5", "--seeds", "0,1"]
    assert stand_in.main(given) == 0
    lines = [json.loads(x) for x in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * 2 * (1 + len(stand_in.WAYS))
    for line in lines:
        assert np.isfinite([line[name] for name in stand_in.MEASURES]).all()
        assert (line["kl"] > 1e-6) == (line["way"] != "whole")
    said = capsys.readouterr().out.splitlines()
    assert [row.split()[:2] for row in said[1:-1]] == [
        ["1.00", "whole"], *(["0.50", way] for way in stand_in.WAYS)
    ]  # fmt: skip
    # By hand: the mean over seeds of the clients' means, and its difference to masking.
    kl = {
        way: [
            np.mean([x["kl"] for x in lines if (x["way"], x["seed"]) == (way, s)]) for s in (0, 1)
        ]
        for way in stand_in.WAYS
    }
    row = next(row.split() for row in said if " nearest " in row)
    assert float(row[-4]) == pytest.approx(np.mean(kl["nearest"]), abs=1e-4)
    difference = np.subtract(kl["nearest"], kl["masking"]).mean()
    assert float(row[-3]) == pytest.approx(difference, abs=1e-4)


def test_missing_data_is_one_line(tmp_path, monkeypatch, world, capsys):
    def missing(*given):
        raise TaskError("agnews: no such file")

    monkeypatch.setattr(stand_in.worlds, "open_base", lambda *given: world.base)
    monkeypatch.setattr(stand_in.tasks, "heldout_text", missing)
    assert stand_in.main(["--data", str(tmp_path), "--work", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "benchmarks.stand_in: agnews: no such file\n"
