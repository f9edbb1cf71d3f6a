"""Tables that say where every byte and second of an artifact goes, and why each layer holds no further expert."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from rich.table import Table

from export import costs, items, work
from export.items import CAPS, Values
from export.plan import MB, Plan
from protocol.manifest import BaseIndex, Manifest, Slot, TensorSpec


def inputs_by_kind(specs: Sequence[TensorSpec]) -> dict[str, int]:
    """Bytes of a program's inputs: batch, dense, router rows, experts, adapter."""
    kinds: Counter[str] = Counter()
    for spec in specs:
        if not spec.name.startswith(("layers.", "dense.")):
            kind = "batch"
        elif spec.name.startswith("dense."):
            kind = "dense"
        elif "router_" in spec.name or spec.name.endswith("resident"):
            kind = "router rows"
        else:
            kind = "experts"
        kinds[kind] += costs.spec_bytes([spec])
    return dict(kinds)


def describe(slots: Sequence[Slot]) -> str:
    """Slots of a layer, equal ones together.

    >>> describe([Slot(format="int8", rank=8), Slot(format="int4", rank=0), Slot(format="int4", rank=0)])
    '1 int8 r8, 2 int4 frozen'
    """
    words = [f"{s.format} r{s.rank}" if s.rank else f"{s.format} frozen" for s in slots]
    return ", ".join(f"{n} {word}" for word, n in Counter(words).items())


def why_not_more(base: BaseIndex, plan: Plan, values: Values, rank: int) -> list[str]:
    """Per layer: the most valuable expert that is not there, and what is in its way."""
    left = plan.budget.limits - plan.used
    cheapest = items.states(base, rank)[0]
    uplink = costs.slot_uplink(base, cheapest)
    rates, lines = plan.budget.rates, []
    tokens = plan.shape.batch * plan.shape.sequence
    operations = work.unpacking(base, cheapest) + work.adapter_work(base, cheapest) * tokens
    need = np.array(
        [
            costs.slot_memory(base, cheapest),
            costs.slot_flash(base, cheapest),
            rates.steps * operations / rates.operations + uplink / rates.uplink,
            uplink,
        ]
    )
    for layer, ids in enumerate(plan.experts):
        absent = [int(e) for e in np.argsort(values.places[layer]) if int(e) not in ids]
        if not absent:
            lines.append("all are there")
        elif values.selected is not None:
            lines.append("selected by hand")
        elif (short := np.flatnonzero(need > left)).size:
            cap = int(short[0])
            needs, has = amount(cap, need[cap]), amount(cap, max(0.0, left[cap]))
            share = 100 * values.mass[layer, absent[0]]
            lines.append(
                f"expert {absent[0]} ({share:.1f}%): {CAPS[cap]}: needs {needs}, {has} left"
            )
        else:
            lines.append(f"expert {absent[0]}: left out so that devices share the program")
    return lines


def amount(cap: int, value: float) -> str:
    """A figure of a cap with its unit.

    >>> amount(0, 3 << 20), amount(2, 1.5)
    ('3.0 MB', '1.5 s')
    """
    return f"{value:.1f} s" if CAPS[cap] == "time" else f"{value / MB:.1f} MB"


def tables(
    base: BaseIndex, artifact: Manifest, plan: Plan, values: Values, rank: int
) -> list[Table]:
    """Memory, flash, seconds, and one row per layer; memory as the manifest has it, after lowering."""
    memory = artifact.memory
    kinds = inputs_by_kind(artifact.train.inputs)
    counted = sum(kinds.values())
    parts = {
        "arena: activations, gradients": memory.arena,
        f"dense, {plan.shape.dense}": kinds.get("dense", 0),
        "experts": kinds.get("experts", 0) + memory.inputs - counted,
        "router rows": kinds.get("router rows", 0),
        "batch": kinds.get("batch", 0),
        "adapter": memory.parameters,
        "optimizer": memory.optimizer,
        "outputs": memory.outputs,
        "runtime": memory.runtime,
    }
    flash = {
        **plan.flash,
        "programs": artifact.train.blob.bytes + artifact.evaluate.blob.bytes,
    }
    limits = plan.budget.limits
    uplink = {"adapters of trained experts": plan.uplink}
    made = [
        _amounts("peak memory", parts, limits[0], 0),
        _amounts("flash", flash, limits[1], 1),
        _amounts(f"a round of {plan.budget.rates.steps} steps", plan.seconds, limits[2], 2),
        _amounts("uplink of a round", uplink, limits[3], 3),
    ]
    shape = plan.shape
    title = (
        f"{artifact.profile}: {shape.batch} x {shape.sequence} tokens, dense {shape.dense}, floor {plan.theta:.2f}, "
        f"within {100 * (1 - plan.bound):.1f}% of the best there can be"
    )
    layers = Table(title=title, title_justify="left")
    for heading in ("layer", "slots", "experts", "routing kept", "the next one"):
        layers.add_column(heading)
    for place, (layer, why) in enumerate(
        zip(base.moe_layers, why_not_more(base, plan, values, rank), strict=True)
    ):
        ids = list(plan.experts[place])
        share = f"{100 * float(values.mass[place, ids].sum()):.1f}%"
        layers.add_row(
            str(layer), describe(shape.slots[place]), " ".join(map(str, ids)), share, why
        )
    return [*made, layers]


def _amounts(title: str, parts: Mapping[str, float], limit: float, cap: int) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("what")
    table.add_column("how much", justify="right")
    table.add_column("share", justify="right")
    for name, value in parts.items():
        table.add_row(name, amount(cap, value), f"{100 * value / limit:.1f}%")
    total = sum(parts.values())
    table.add_section()
    table.add_row("total", amount(cap, total), f"{100 * total / limit:.1f}%")
    table.add_row("budget", amount(cap, limit), "")
    return table
