"""Generating with transformers and stock PEFT over the same blobs: what the other runtimes are held to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache

from edge import submoe_torch
from edge.decode import GenerateError, Opened
from edge.session import SessionError


class TorchDecoder:
    """The sub-MoE with transformers' own cache."""

    def __init__(self, model: submoe_torch.SubMoe, context: int) -> None:
        self._model, self._cache, self._context = model, DynamicCache(), context

    def read(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """See `Decoder`."""
        held = int(self._cache.get_seq_length())
        if held + len(tokens) > self._context:
            raise GenerateError(f"{held + len(tokens)} tokens, the program holds {self._context}")
        with torch.no_grad():
            hidden = self._model.body(
                torch.tensor([list(tokens)]), past_key_values=self._cache, use_cache=True
            ).last_hidden_state
            logits: NDArray[np.float32] = self._model.head(hidden[0, -1:])[0].numpy()
        return logits

    def restart(self) -> None:
        """See `Decoder`."""
        self._cache = DynamicCache()

    def close(self) -> None:
        """See `Decoder`."""
        del self._model


def open_decoder(opened: Opened, threads: int) -> TorchDecoder:
    """Build the model; raises GenerateError."""
    torch.set_num_threads(threads)
    try:
        model = submoe_torch.build(opened.artifact, opened.resident)
    except SessionError as error:
        raise GenerateError(str(error)) from error
    for name, view in model.views(lambda parameter: parameter.detach().numpy()).items():
        if name in opened.adapter:
            view[...] = opened.adapter[name]
    return TorchDecoder(model, opened.plan.context)
