"""From verdicts to a preference dataset: candidates, settled pairs, the route of each, and the merge with people."""
