"""Checkpoint + profile -> artifact: cut, quantise, lower, plan."""

import logging

# These announce on import what of theirs is missing or deprecated. None of it is used here,
# and it would bury our one line.
for _name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
