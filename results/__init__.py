"""What a search leaves behind: candidates, the journal, the study's folder, the front, exports, reports, the MLflow
mirror. A finished study opens here without the search; nothing here imports Optuna or decides what is tried next."""
