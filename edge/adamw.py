"""AdamW over live parameter aliases: the runtime only has SGD, so the update is written into its arrays here."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[np.float32]]


class AdamW:
    """Adam (Kingma & Ba) with clipping of the global norm; no weight decay, state starts at zero.

    Parameters
    ----------
    rates : name -> learning rate; its keys are the parameters
    betas, eps, clip : as usual; gradients are scaled down so that their common norm is at most `clip`
    """

    def __init__(
        self,
        rates: Mapping[str, float],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        clip: float = 1.0,
    ) -> None:
        self.rates, self.betas, self.eps, self.clip = dict(rates), betas, eps, clip
        self.steps = 0
        self._moments: dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}

    def step(self, parameters: Arrays, gradients: Arrays) -> float:
        """Change `parameters` in place. Returns the gradients' norm before clipping (NaN when one is not finite).

        A parameter whose gradient has always been zero stays bit-identical.
        """
        # In float64: the sum has millions of terms.
        norm = float(
            np.sqrt(sum(float(np.square(gradients[n], dtype=np.float64).sum()) for n in self.rates))
        )
        if not np.isfinite(norm):
            return float("nan")
        scale = np.float32(min(1.0, self.clip / (norm + 1e-6)))
        self.steps += 1
        first, second = (np.float32(b) for b in self.betas)
        correct1 = 1 - self.betas[0] ** self.steps
        correct2 = 1 - self.betas[1] ** self.steps
        for name, rate in self.rates.items():
            parameter, gradient = parameters[name], gradients[name] * scale
            if name not in self._moments:
                self._moments[name] = (np.zeros_like(gradient), np.zeros_like(gradient))
            mean, square = self._moments[name]
            mean *= first
            mean += (1 - first) * gradient
            square *= second
            np.multiply(gradient, gradient, out=gradient)
            gradient *= 1 - second
            square += gradient
            # From here `gradient` is scratch: the denominator, then the step.
            np.sqrt(square, out=gradient)
            gradient *= np.float32(1 / np.sqrt(correct2))
            gradient += np.float32(self.eps)
            np.divide(mean, gradient, out=gradient)
            gradient *= np.float32(rate / correct1)
            parameter -= gradient
        return norm
