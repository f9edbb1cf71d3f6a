"""What of the local objective goes by the size of a device. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from protocol.manifest import Slot
from protocol.objective import Objective


def fitted(
    objective: Objective,
    slots: Sequence[Sequence[Slot]],
    *,
    experts: int,
    top_k: int,
    active_below: float,
    cap_share: float,
) -> Objective:
    """The objective of one device.

    Parameters
    ----------
    objective : the run's
    slots : of the device, per layer
    experts : E of a layer
    active_below : `Objective.active` holds for devices with slots for less than this share of the experts, the others
        use as many per token as the base does (FLAME, arXiv 2506.16600, FFT-MoE, arXiv 2508.18663); 0: for all
    cap_share : `Objective.cap` as a share of a layer's slots, but no fewer than `top_k` (the budget C of HFedMoE,
        arXiv 2601.00583, eq 15); 0: as the objective says

    Examples
    --------
    >>> four = [[Slot(format="int4", rank=4)] * 4] * 2
    >>> def of(experts):
    ...     return fitted(Objective(active=1, cap=1), four, experts=experts, top_k=1, active_below=0.25, cap_share=0.5)
    >>> [(of(e).active, of(e).cap) for e in (16, 17)]  # 4 of 16 are a quarter, 4 of 17 are less
    [(0, 2), (1, 2)]
    """
    each = sum(map(len, slots)) / max(len(slots), 1)
    if active_below and each >= active_below * experts:
        objective = replace(objective, active=0)
    if cap_share and objective.cap:
        objective = replace(objective, cap=max(top_k, int(cap_share * each)))
    return objective
