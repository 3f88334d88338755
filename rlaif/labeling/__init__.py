"""From answers to labeled pairs: judging rounds, candidate table, dataset and exams. Combines judge/ and pair/."""
