"""The loop that decides which recipe comes next; the only place that imports Optuna. What a search leaves behind
belongs to `results`, what carries a recipe out to `runners`."""
