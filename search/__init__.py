"""The search: the loop that decides which recipe to try next. Only this folder imports Optuna.

What a search leaves behind belongs to `results`, and what executes a recipe to `runners`.
"""
