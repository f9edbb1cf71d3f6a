"""The small MoE language model that ships with the project, and the scripts that made it."""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
