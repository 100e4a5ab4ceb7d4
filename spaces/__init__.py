"""What may be done to a network: recipes, layers, spaces. Plain data; no tensor and no Optuna."""
