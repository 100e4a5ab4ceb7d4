"""What is good: measured numbers, costs by arithmetic, objectives, budgets and order."""
