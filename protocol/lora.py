"""LoRA arithmetic that every side must share: the scale, the fresh factors, the product.

Letters: R rank, I input features, O output features. `A` is [R, I], `B` is [O, R], the change to W [O, I] is
`SCALE * B @ A`, as in PEFT with `lora_alpha = SCALE * R`. Adapter experts (projection `adapter`, see `fft_moe`) keep
their factors under the same names and start from the same fresh A, but have no scale and a nonlinearity in between.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

SCALE = 2.0


def alpha(rank: int) -> int:
    """PEFT's `lora_alpha` for our scale."""
    return int(SCALE * rank)


def fresh_a(name: str, rank: int, features: int) -> NDArray[np.float32]:
    """The A factor that an untrained expert starts from, the same on every machine.

    Parameters
    ----------
    name : str
        Global name of the factor; seeds the values.

    Returns
    -------
    float32 [rank, features], uniform with variance 1 / (3 * features) (Kaiming-uniform, PEFT's default)
    """
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    bound = 1 / np.sqrt(features)
    return np.random.default_rng(seed).uniform(-bound, bound, (rank, features)).astype(np.float32)


def delta(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    """The change to the weight, [O, I].

    >>> delta(np.ones((1, 2)), np.ones((1, 1))).tolist()
    [[2.0, 2.0]]
    """
    return np.asarray(SCALE * (b @ a))
