"""`rlaif plan`, --dry-run and the estimates of `rlaif run`: arithmetic on the pilot's measurements."""
