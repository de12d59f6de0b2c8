"""How many bits each weight gets: candidates, budgets, search, and what each plan would take and lose."""
