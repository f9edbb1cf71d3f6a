"""The scoreboard: methods of federated fine-tuning of MoE models, compared at equal memory on real text.

    python -m benchmarks.federated --suite agnews-0.1 --data DIR --out runs      every run a file of JSON lines
    python -m benchmarks.federated.page --runs runs --out docs/scoreboard        tables, figures, one HTML page

Lines of a run, OUT/<suite>/<method>/<seed>.jsonl, in order: "run" (settings and clients), "score" before training,
"round" (who took part, bytes, losses, coverage) and "score" as rounds go by, "score" at the end, "end" (seconds, and
bytes of the last leases). A score's scope is "global", the model with all experts on rows that no client has, or
"device", a client's own sub-MoE on its own held-back rows; its split is "validation", "test" or "held_back". The task
"heldout" with the metric lm_loss is the loss on text like that of pretraining: the measure of forgetting.
Device seconds are modelled from profiles, not measured.
"""
