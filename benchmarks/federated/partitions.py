"""Which client has which rows, what it may hold, and who takes part in a round. Pure; random numbers are passed in.

Letters: N rows of a task, C clients.

Settings of FedMoE (arXiv 2408.11304), 30 clients, 5 a round:

- standard-t: every client has one task; a round draws clients at random.
- standard-td: and within its task a client sees its own mix of labels or topics, Dirichlet(alpha) as in FedNLP
  (arXiv 2104.08815): labels of AG News, topics of paragraphs of SQuAD and of documents of XSum (`topics`).
- enforced-t, enforced-td: the same clients, but a round draws three, each of another task, so that every round's
  updates conflict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lab import partition

Rows = Mapping[str, NDArray[np.int64]]
SETTINGS = ("standard-t", "standard-td", "enforced-t", "enforced-td")
SMALLEST = 10  # rows of a client under quantity skew: fewer cannot be trained and measured


@dataclass(frozen=True, kw_only=True)
class Client:
    """Indices into each task's training rows; no two clients, and no two of a client's parts, share one."""

    name: str
    train: Rows
    held_back: Rows

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks that the client has rows of."""
        return tuple(sorted(self.train))


def lengths(
    rows: int, clients: int, rng: np.random.Generator, quantity: float | None = None
) -> NDArray[np.int64]:
    """How many of `rows` each client gets; they sum to `rows`.

    Parameters
    ----------
    quantity : float or None
        Concentration of a Dirichlet over clients (FedNLP's quantity skew), each at least SMALLEST or an even share;
        None for even shares.

    Raises
    ------
    ValueError
        Fewer rows than clients.

    Examples
    --------
    >>> lengths(7, 3, np.random.default_rng(0)).tolist()
    [3, 2, 2]
    """
    if rows < clients:
        raise ValueError(f"{rows} rows are too few for {clients} clients")
    if quantity is None:
        return np.array([len(part) for part in np.array_split(np.arange(rows), clients)])
    least = min(SMALLEST, rows // clients)
    share = rng.dirichlet(np.full(clients, quantity)) * (rows - least * clients)
    found = least + np.floor(share).astype(np.int64)
    rest = np.argsort(-(share - np.floor(share)), kind="stable")[: rows - int(found.sum())]
    found[rest] += 1
    return found


def divide(
    groups: Sequence[str],
    clients: int,
    rng: np.random.Generator,
    *,
    alpha: float | None,
    quantity: float | None = None,
    rows_each: int | None = None,
) -> list[NDArray[np.int64]]:
    """Divide the rows of one task.

    Parameters
    ----------
    groups : N str
        Label or topic of each row.
    alpha : float or None
        Concentration of each client's mix of groups; None for IID.
    quantity : float or None
        As for `lengths`.
    rows_each : int or None
        Mean number of rows of a client, if there are as many; None divides all rows. Where all are divided, or nearly
        all, the mixes are milder than `alpha` says: the last rows go to whoever still wants some. (30 clients, four
        labels, alpha 0.1: the commonest label is 73 % of a client's rows; with two thirds of the rows divided, 86 %.)

    Returns
    -------
    C arrays of row indices, disjoint, sorted

    Raises
    ------
    ValueError
        Too few rows, or an alpha that is not positive.
    """
    total = len(groups) if rows_each is None else min(len(groups), rows_each * clients)
    sizes = lengths(total, clients, rng, quantity)
    if alpha is not None:
        return partition.dirichlet(groups, clients, sizes.tolist(), alpha, rng)
    order = rng.permutation(len(groups))
    return [np.sort(part) for part in np.split(order[:total], np.cumsum(sizes)[:-1])]


def _holding_back(
    parts: Sequence[Mapping[str, NDArray[np.int64]]], share: float, rng: np.random.Generator
) -> list[Client]:
    """Clients from their rows: of each task's, `share` is held back, at least one of two or more."""
    clients = []
    for number, tasks in enumerate(parts):
        train, held = {}, {}
        for task in sorted(tasks):
            order = rng.permutation(tasks[task])
            count = max(round(share * len(order)), min(1, len(order) - 1))
            held[task], train[task] = np.sort(order[:count]), np.sort(order[count:])
        clients.append(Client(name=f"c{number:02d}", train=train, held_back=held))
    return clients


def one_task(
    name: str,
    groups: Sequence[str],
    clients: int,
    rng: np.random.Generator,
    *,
    alpha: float | None,
    quantity: float | None = None,
    rows_each: int | None = None,
    held_back: float = 0.2,
) -> list[Client]:
    """Clients of one task: label skew for an `alpha`, IID without. See `divide`."""
    parts = divide(groups, clients, rng, alpha=alpha, quantity=quantity, rows_each=rows_each)
    return _holding_back([{name: part} for part in parts], held_back, rng)


def task_skew(
    groups: Mapping[str, Sequence[str]],
    clients: int,
    rng: np.random.Generator,
    *,
    tasks_each: tuple[int, int] = (1, 2),
    alpha: float | None = None,
    rows_each: int | None = None,
    held_back: float = 0.2,
) -> list[Client]:
    """Clients with a few of many tasks each.

    Parameters
    ----------
    groups : task -> label or topic of each of its rows
    tasks_each : (least, most)
        Number of tasks of a client. Every task gets a client while there are clients enough.
    alpha : float or None
        Skew of labels or topics among the clients of a task; None for IID.
    rows_each : int or None
        Mean number of rows that a client has of one of its tasks, if there are as many.

    Raises
    ------
    ValueError
        A range of tasks that cannot be, or a task with fewer rows than clients.
    """
    names = sorted(groups)
    least, most = tasks_each
    if not 1 <= least <= most <= len(names):
        raise ValueError(f"{least} to {most} tasks a client wanted of {len(names)}")
    chosen: list[list[str]] = [[] for _ in range(clients)]
    counts = rng.integers(least, most + 1, size=clients)
    waiting: list[str] = []
    for client in range(clients):
        for _ in range(int(counts[client])):
            # Through all tasks in turn, in a fresh order each time: the numbers of their clients stay even.
            if not any(name not in chosen[client] for name in waiting):
                waiting += [names[i] for i in rng.permutation(len(names))]
            task = next(name for name in waiting if name not in chosen[client])
            waiting.remove(task)
            chosen[client].append(task)
    parts: list[dict[str, NDArray[np.int64]]] = [{} for _ in range(clients)]
    for name in names:
        holders = [client for client in range(clients) if name in chosen[client]]
        if holders:
            found = divide(groups[name], len(holders), rng, alpha=alpha, rows_each=rows_each)
            for client, rows in zip(holders, found, strict=True):
                parts[client][name] = rows
    return _holding_back(parts, held_back, rng)


def fedmoe(
    groups: Mapping[str, Sequence[str]],
    setting: str,
    rng: np.random.Generator,
    *,
    clients: int = 30,
    alpha: float = 0.1,
    rows_each: int | None = None,
    held_back: float = 0.2,
) -> list[Client]:
    """Clients of one task each, as many of every task; with "-td", label or topic skew within the tasks.

    Raises
    ------
    ValueError
        Unknown setting; see `task_skew`.
    """
    if setting not in SETTINGS:
        raise ValueError(f"no setting {setting!r}; known: {', '.join(SETTINGS)}")
    return task_skew(
        groups,
        clients,
        rng,
        tasks_each=(1, 1),
        alpha=alpha if setting.endswith("-td") else None,
        rows_each=rows_each,
        held_back=held_back,
    )


def sample_round(
    rng: np.random.Generator, clients: Sequence[Client], setting: str, per_round: int = 5
) -> list[str]:
    """Names of the clients of one round, sorted.

    "enforced-*": three clients whatever `per_round` says, of three tasks drawn at random, each drawn among the
    task's clients. Any other setting: `per_round` at random.

    Raises
    ------
    ValueError
        Fewer tasks or clients than wanted.
    """
    if not setting.startswith("enforced"):
        if per_round > len(clients):
            raise ValueError(f"{per_round} clients a round wanted of {len(clients)}")
        drawn = rng.choice(len(clients), per_round, replace=False)
        return sorted(clients[i].name for i in drawn)
    tasks = sorted({task for client in clients for task in client.tasks})
    if len(tasks) < 3:
        raise ValueError(f"{setting} wants three tasks, {len(tasks)} found: {', '.join(tasks)}")
    names: list[str] = []
    for task in rng.choice(tasks, 3, replace=False):
        holders = [c.name for c in clients if task in c.tasks and c.name not in names]
        if not holders:
            raise ValueError(f"{setting}: no other client has {task}")
        names.append(str(rng.choice(holders)))
    return sorted(names)


def budgets(
    clients: Sequence[Client], rng: np.random.Generator, low: float = 0.15, high: float = 0.5
) -> dict[str, float]:
    """Share of all experts that each client can hold: evenly spread over [low, high], dealt at random.

    An even spread has the same mean in every run, so that seeds differ in who is weak, not in how weak the fleet is.

    >>> sorted(budgets([], np.random.default_rng(0)))
    []
    """
    spread = rng.permutation(np.linspace(low, high, len(clients)))
    return {client.name: float(x) for client, x in zip(clients, spread, strict=True)}


def failures(rng: np.random.Generator, clients: Sequence[str], rate: float) -> list[str]:
    """Clients of a round that train and never deliver, each with probability `rate`, in the given order.

    One number is drawn for each client whatever the rate: with one seed, those that fail at a low rate fail at a
    higher one too, and later draws are the same.

    >>> failures(np.random.default_rng(0), ["a", "b"], 1.0)
    ['a', 'b']
    """
    drawn = rng.random(len(clients))
    return [name for name, x in zip(clients, drawn, strict=True) if x < rate]
