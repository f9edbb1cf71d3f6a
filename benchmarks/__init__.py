"""What the figures of the README and of docs/experiments.md were measured with."""
