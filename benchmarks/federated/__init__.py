"""The scoreboard: methods of federated fine-tuning of MoE models, compared at equal memory on real text."""
