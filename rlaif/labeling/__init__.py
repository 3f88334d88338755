"""From answers to labeled pairs: judging rounds, the candidate table, the dataset. Where judge/ and pair/ meet."""
