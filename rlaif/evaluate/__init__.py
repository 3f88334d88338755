"""Compare the trained model with its reference: answers, verdicts, win rate, refusals, checks and KL divergence."""
