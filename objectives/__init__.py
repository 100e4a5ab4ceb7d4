"""What is good, in numbers: measurements, objectives, budgets, fronts, costs by arithmetic. Nothing here knows a
search, a runtime or a file."""
