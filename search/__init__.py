"""The loop: the only place that imports Optuna and MLflow."""
