"""Error feedback: what the coding of one update lost is added to the next one. Pure.

Letters: R rank, I input features, O output features, e residual, A and A* the lora_A of then and of now.

What a device sends is `code(change + e)`; the new e is what that lost. The sum of what arrives then stays within one
rounding error of the sum of all changes, whereas without it every entry that is small beside its group is lost in
every round (arXiv 1901.09847).

LoRA factors need one more step. Between two leases the server projects the products B A anew, so that the same
product comes back as other factors (B*, A*): rotated, re-scaled, with other signs. A residual of the old factors has
to follow. With M = A* A^+ [R, R], A* is close to M A and B* to B M^+, so that

    e_B*  =  e_B (A A*^+)        which keeps  e_B A  as far as the new rows reach it
    e_A*  =  M e_A               which keeps  B e_A  likewise

Where the new rows have left the old ones behind, both maps are close to zero, and the residual, which could only do
harm there, goes by itself. Nothing has to be thrown away by a rule. Factors that did not move get themselves back.
Adapter experts are averaged factor by factor: their residuals, like those of router rows, are carried as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge.session import FloatArrays
from protocol import names, uplink
from protocol.tensors import Tensors

RESIDUAL, BASIS = "residual.", "basis."
"""Before the name of a tensor in what a device keeps: its residual; the lora_A that residual belongs to."""
RCOND = 1e-3
"""Rows of A that are shorter than this beside the longest are noise, not directions to map onto."""
Arrays = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True)
class Coded:
    """What goes onto the wire, and what stays."""

    tensors: Tensors  # of `protocol.uplink`
    kept: FloatArrays  # `residual.<name>`, `basis.<name of a lora_A>`


def basis_of(name: str) -> str | None:
    """The lora_A whose rows a factor's residual is written in; None when nothing turns it between leases.

    >>> basis_of("layers.0.experts.1.up.lora_B")
    'layers.0.experts.1.up.lora_A'
    >>> basis_of("layers.0.router.1") is None
    True
    """
    parsed = names.parse(name)
    if parsed is None or parsed.projection in (None, "adapter"):
        return None
    return names.lora(parsed.layer, parsed.expert, parsed.projection, "lora_A")


def turned(
    residual: NDArray[np.float32], factor: str, old: NDArray[np.float32], new: NDArray[np.float32]
) -> NDArray[np.float32]:
    """A factor's residual in the basis of the new lora_A.

    Parameters
    ----------
    residual : [R, I] of a lora_A, [O, R] of a lora_B
    factor : "lora_A" | "lora_B"
    old, new : lora_A [R, I]

    Examples
    --------
    >>> old, new = np.float32([[1, 0, 0], [0, 1, 0]]), np.float32([[0, -2, 0], [1, 0, 0]])
    >>> turned(np.float32([[4, 6]]), "lora_B", old, new).round(3).tolist()  # the product stays [4, 6, 0]
    [[-3.0, 4.0]]
    """
    if np.array_equal(old, new):
        return residual
    wide, onto = old.astype(np.float64), new.astype(np.float64)
    if factor == "lora_A":
        turn = onto @ np.linalg.pinv(wide, RCOND)
        return np.asarray(turn @ residual, np.float32)
    turn = wide @ np.linalg.pinv(onto, RCOND)
    return np.asarray(residual @ turn, np.float32)


def warm() -> None:
    """Load what `turned` needs: the code and the buffers of LAPACK, which no lease should be charged for."""
    np.linalg.pinv(np.ones((4, 256)), RCOND)


def carried(kept: Arrays, leased: Arrays, sent: Mapping[str, NDArray[np.float32]]) -> FloatArrays:
    """The residuals of former updates for what this lease sends, in the basis of its adapter.

    Parameters
    ----------
    kept : `Coded.kept` of this device's last coded update
    leased : the lease's adapter
    sent : name -> change; residuals of other names, or of another shape, are left out
    """
    found: FloatArrays = {}
    for name, change in sent.items():
        residual = kept.get(RESIDUAL + name)
        if residual is None or residual.shape != change.shape:
            continue
        basis = basis_of(name)
        if basis is None:
            found[name] = residual
        elif (old := kept.get(BASIS + basis)) is not None and basis in leased:
            if old.shape == leased[basis].shape:
                found[name] = turned(residual, name.rpartition(".")[2], old, leased[basis])
    return found


def code(change: Arrays, leased: Arrays, kept: Arrays, kind: uplink.Kind) -> Coded:
    """Code a change together with what former updates still owe.

    Parameters
    ----------
    change : name -> new value less leased value, of everything that is sent
    leased : the lease's adapter, global names
    kept : `Coded.kept` of the last coded update, empty at first

    Raises
    ------
    TensorError
        A change that cannot be coded.
    """
    owed = carried(kept, leased, change)
    whole = {n: value + owed[n] if n in owed else value for n, value in change.items()}
    tensors = uplink.encode(whole, kind)
    arrived = uplink.decode(tensors, {n: v.shape for n, v in whole.items()}, kind)
    keep: FloatArrays = {}
    for name, value in whole.items():
        keep[RESIDUAL + name] = value - arrived[name]
        basis = basis_of(name)
        if basis is not None and basis in leased:
            keep[BASIS + basis] = leased[basis] + arrived.get(basis, np.float32(0))
    return Coded(tensors=tensors, kept={**_waiting(kept, keep), **keep})


def _waiting(kept: Arrays, keep: Arrays) -> FloatArrays:
    """Residuals of factors that were not sent this time beside one that was: alternating factors take turns."""
    found: FloatArrays = {}
    for key, residual in kept.items():
        name = key.removeprefix(RESIDUAL)
        basis = basis_of(name)
        if key in keep or name == key or basis is None or BASIS + basis not in keep:
            continue
        old, new = kept.get(BASIS + basis), keep[BASIS + basis]
        if old is not None and old.shape == new.shape:
            found[key] = turned(residual, name.rpartition(".")[2], old, new)
    return found
