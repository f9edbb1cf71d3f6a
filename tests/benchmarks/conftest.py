"""The tiny base of the devices' tests."""

from tests.edge.conftest import artifact, tiny_checkpoint, tiny_store, tokenizer

__all__ = ["artifact", "tiny_checkpoint", "tiny_store", "tokenizer"]
