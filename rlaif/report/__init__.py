"""What a person wants to know: what a run has, and what this machine can do."""
