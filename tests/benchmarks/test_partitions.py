from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.federated import partitions
from benchmarks.federated.partitions import Client

TASKS = {
    "agnews": ["World", "Sports", "Business", "Sci"] * 100,
    "squad": [f"topic {i % 8}" for i in range(300)],
    "xsum": [f"topic {i % 8}" for i in range(200)],
}


def rng(seed=0):
    return np.random.default_rng(seed)


def drawn(clients, task):
    """All indices of a task that some client has, training and held back."""
    parts = [c.train[task] for c in clients if task in c.train]
    return np.concatenate(parts + [c.held_back[task] for c in clients if task in c.train])


def same(one, two):
    return len(one) == len(two) and all(
        a.name == b.name
        and a.tasks == b.tasks
        and all((a.train[t] == b.train[t]).all() for t in a.tasks)
        and all((a.held_back[t] == b.held_back[t]).all() for t in a.tasks)
        for a, b in zip(one, two, strict=True)
    )


@settings(max_examples=80, deadline=None)
@given(
    groups=st.lists(st.sampled_from("abcd"), min_size=12, max_size=120),
    clients=st.integers(1, 12),
    alpha=st.none() | st.sampled_from([0.05, 0.5, 50.0]),
    quantity=st.none() | st.sampled_from([0.2, 1.0, 20.0]),
    rows_each=st.none() | st.integers(1, 9),
    seed=st.integers(0, 9),
)
def test_parts_are_disjoint_complete_and_the_same_again(
    groups, clients, alpha, quantity, rows_each, seed
):
    def made():
        return partitions.one_task(
            "t",
            groups,
            clients,
            rng(seed),
            alpha=alpha,
            quantity=quantity,
            rows_each=rows_each,
        )

    found = made()
    flat = drawn(found, "t")
    wanted = len(groups) if rows_each is None else min(len(groups), clients * rows_each)
    assert len(flat) == len(set(flat.tolist())) == wanted
    assert flat.min() >= 0
    assert flat.max() < len(groups)
    assert [c.name for c in found] == [f"c{i:02d}" for i in range(clients)]
    for client in found:
        assert len(client.train["t"]) >= 1
        if len(client.train["t"]) + len(client.held_back["t"]) > 1:
            assert len(client.held_back["t"]) >= 1
    assert same(found, made())


@settings(max_examples=60)
@given(
    rows=st.integers(30, 5000),
    clients=st.integers(1, 30),
    quantity=st.none() | st.floats(0.05, 50),
    seed=st.integers(0, 99),
)
def test_lengths_sum_up(rows, clients, quantity, seed):
    found = partitions.lengths(rows, clients, rng(seed), quantity)
    assert found.sum() == rows
    assert len(found) == clients
    assert found.min() >= min(partitions.SMALLEST, rows // clients)


def test_quantity_skew_grows_as_its_concentration_falls():
    spread = [
        np.mean([partitions.lengths(3000, 30, rng(s), q).std() for s in range(20)])
        for q in (0.2, 1.0, 20.0)
    ]
    assert spread[0] > 1.5 * spread[1] > 3 * spread[2]
    assert partitions.lengths(3000, 30, rng()).std() == 0


def label_skew(alpha, seed=0):
    """Mean over clients of the share of their commonest label."""
    labels = TASKS["agnews"]
    parts = partitions.divide(labels, 20, rng(seed), alpha=alpha, rows_each=15)
    return np.mean([Counter(labels[i] for i in p).most_common(1)[0][1] / len(p) for p in parts])


def test_label_skew_grows_as_alpha_falls():
    found = [np.mean([label_skew(a, s) for s in range(5)]) for a in (0.1, 0.5, 5.0, None)]
    assert found == sorted(found, reverse=True)
    assert found[0] > 0.75
    assert abs(found[2] - found[3]) < 0.2


@pytest.mark.parametrize("setting", partitions.SETTINGS)
def test_fedmoe_clients_have_one_task_each(setting):
    clients = partitions.fedmoe(TASKS, setting, rng(1))
    assert len(clients) == 30
    assert Counter(c.tasks for c in clients) == {(t,): 10 for t in TASKS}
    for task, groups in TASKS.items():
        flat = drawn(clients, task)
        assert sorted(flat.tolist()) == list(range(len(groups)))
    assert same(clients, partitions.fedmoe(TASKS, setting, rng(1)))
    assert not same(clients, partitions.fedmoe(TASKS, setting, rng(2)))


def test_only_td_skews_within_a_task():
    def share(setting):
        clients = partitions.fedmoe(TASKS, setting, rng(3), rows_each=20)
        tops = []
        for client in clients:
            (task,) = client.tasks
            groups = Counter(TASKS[task][i] for i in client.train[task])
            tops.append(groups.most_common(1)[0][1] / groups.total())
        return np.mean(tops)

    assert share("standard-td") > share("standard-t") + 0.2
    assert share("standard-td") == share("enforced-td")


def test_task_skew_gives_one_or_two_tasks_and_every_task_a_client():
    groups = {f"task {i}": ["x"] * 120 for i in range(11)}
    clients = partitions.task_skew(groups, 30, rng(5), rows_each=20)
    assert {len(c.tasks) for c in clients} == {1, 2}
    holders = Counter(t for c in clients for t in c.tasks)
    assert set(holders) == set(groups)
    assert max(holders.values()) - min(holders.values()) <= 2
    for task in groups:
        flat = drawn(clients, task)
        assert len(flat) == len(set(flat.tolist())) == min(120, 20 * holders[task])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: partitions.task_skew(TASKS, 5, rng(), tasks_each=(2, 4)), "2 to 4 tasks"),
        (lambda: partitions.task_skew({"a": ["x"]}, 5, rng(), tasks_each=(1, 1)), "too few"),
        (lambda: partitions.fedmoe(TASKS, "standard", rng()), "no setting 'standard'"),
        (lambda: partitions.one_task("a", ["x"] * 9, 3, rng(), alpha=0.0), "positive"),
        (lambda: partitions.sample_round(rng(), [], "standard-t"), "5 clients a round"),
        (
            lambda: partitions.sample_round(rng(), [client("c", "a")], "enforced-t"),
            "three tasks, 1 found: a",
        ),
        (
            lambda: partitions.sample_round(rng(), [client("c", "a", "b", "d")], "enforced-t"),
            "no other client",
        ),
    ],
)
def test_what_cannot_be_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def client(name, *tasks):
    rows = {task: np.arange(3) for task in tasks}
    return Client(name=name, train=rows, held_back=rows)


@pytest.mark.parametrize("setting", partitions.SETTINGS)
def test_rounds(setting):
    clients = partitions.fedmoe(TASKS, setting, rng(1))
    task = {c.name: c.tasks[0] for c in clients}
    one, two = rng(7), rng(7)
    rounds = [partitions.sample_round(one, clients, setting) for _ in range(200)]
    assert rounds == [partitions.sample_round(two, clients, setting) for _ in range(200)]
    met = Counter(name for names in rounds for name in names)
    assert set(met) == set(task)
    for names in rounds:
        assert names == sorted(set(names))
        if setting.startswith("enforced"):
            assert {task[n] for n in names} == set(TASKS)
            assert len(names) == 3
        else:
            assert len(names) == 5


def test_budgets_are_the_same_spread_dealt_anew():
    clients = [client(f"c{i}", "a") for i in range(30)]
    one, two = (partitions.budgets(clients, rng(s)) for s in (1, 2))
    assert one == partitions.budgets(clients, rng(1)) != two
    assert sorted(one.values()) == sorted(two.values())
    assert (min(one.values()), max(one.values())) == (0.15, 0.5)
    assert np.mean(list(one.values())) == pytest.approx(0.325)


@settings(max_examples=60)
@given(
    count=st.integers(0, 12),
    rates=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
    seed=st.integers(0, 99),
)
def test_failures_are_nested_and_leave_later_draws_alone(count, rates, seed):
    names = [f"c{i}" for i in range(count)]
    few, many = rng(seed), rng(seed)
    low = partitions.failures(few, names, rates[0])
    high = partitions.failures(many, names, rates[1])
    assert set(low) <= set(high) <= set(names)
    assert low == [n for n in names if n in low]
    assert few.random() == many.random()


def test_failures_come_at_their_rate():
    names = [str(i) for i in range(20000)]
    assert len(partitions.failures(rng(), names, 0.3)) == pytest.approx(6000, abs=300)
    assert partitions.failures(rng(), names, 0.0) == []
