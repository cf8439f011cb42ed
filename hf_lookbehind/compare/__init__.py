"""Methods compared: tasks x methods x budgets x seeds of a program, tuned by one rule, with paired intervals."""
