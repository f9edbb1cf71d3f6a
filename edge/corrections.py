"""What is added to the gradients of a step outside the program: FedProx and SCAFFOLD. Pure.

Letters: K steps of a lease, w parameters, c control variates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from edge.session import FloatArrays

Arrays = Mapping[str, NDArray[np.float32]]


def pull_back(gradients: FloatArrays, parameters: Arrays, start: Arrays, prox: float) -> None:
    """Add the gradient of FedProx's term mu/2 |w - w_start|^2 (arXiv 1812.06127, eq. 2), in place.

    Parameters
    ----------
    gradients : name -> gradient
    parameters, start : the same names: values now, and at the lease
    prox : mu

    Examples
    --------
    >>> g = {"w": np.array([1.0, 0.0], np.float32)}
    >>> pull_back(g, {"w": np.float32([3, 2])}, {"w": np.float32([1, 2])}, prox=0.5)
    >>> g["w"].tolist()
    [2.0, 0.0]
    """
    for name, gradient in gradients.items():
        gradient += np.float32(prox) * (parameters[name] - start[name])


class Control:
    """SCAFFOLD's control variates of one device during one lease (arXiv 1910.06378, algorithm 1).

    Each gradient g becomes g + c - c_i. Afterwards c_i is the mean of the lease's own gradients g. Under plain SGD
    that is the paper's option II, c_i - c + (w_start - w) / (K * rate), to the last digit; under Adam option II would
    give the mean of Adam's normalised steps, which are no gradients and cannot be subtracted from one.

    Parameters
    ----------
    wanted : names that are trained and sent
    shared : c, from the lease; a name that is missing counts as zero
    own : c_i, as this device kept it; likewise
    """

    def __init__(self, wanted: Sequence[str], shared: Arrays, own: Arrays) -> None:
        self._wanted = list(wanted)
        self._shared, self._own = shared, own
        self._sums: dict[str, NDArray[np.float64]] = {}
        self._steps = 0

    def correct(self, gradients: FloatArrays) -> None:
        """Take the gradients of a step into the mean, and correct them in place."""
        self._steps += 1
        for name in self._wanted:
            gradient = gradients[name]
            if name not in self._sums:
                self._sums[name] = np.zeros(gradient.shape)
            self._sums[name] += gradient
            if name in self._shared:
                gradient += self._shared[name]
            if name in self._own:
                gradient -= self._own[name]

    def renewed(self) -> tuple[FloatArrays, FloatArrays]:
        """(the new c_i, its change since the lease), after at least one step."""
        new = {n: (s / self._steps).astype(np.float32) for n, s in self._sums.items()}
        return new, {n: v - self._own[n] if n in self._own else v for n, v in new.items()}
