"""`rlaif run` and what needs several stages: preflight, the stages in order, the run log, notification."""
