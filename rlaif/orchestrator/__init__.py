"""`rlaif run` and what else needs several stages: preflight, pilot, stages in order, run log, notification."""
