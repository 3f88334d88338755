"""``rlaif generate``: prompts in, completions out."""
