"""The device: holds a sub-MoE, trains LoRA on it with local text, brings the update back."""
