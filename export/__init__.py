"""Checkpoint + profile -> artifact: cut, quantise, lower, plan."""
