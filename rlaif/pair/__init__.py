"""From verdicts to a preference dataset: candidates, aggregation, routing, and the merge with human labels."""
