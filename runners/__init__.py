"""What carries recipes out: data, tracing, compression, training, export, files and measurement. Nothing here chooses a
recipe, judges a front, or imports Optuna or MLflow."""
