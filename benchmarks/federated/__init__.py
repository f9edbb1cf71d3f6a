"""The scoreboard: federated methods on real text, measured on the global model and on each device."""
