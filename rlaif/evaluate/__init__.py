"""Is the trained model better? Pure readings of what was answered and judged: win rate, refusals, checks, drift."""
