"""Studies: tasks x methods x budgets x seeds."""
