"""Stage ``rlaif generate``: ingest prompts, sample or import completions."""
