"""The scoreboard: methods of federated MoE fine-tuning on real text, at equal memory, bytes and effort."""
