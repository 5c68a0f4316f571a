"""Plans side by side: search space, ranking, the choice."""
