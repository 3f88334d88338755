"""``rlaif judge``: judge files and models in, verdicts out."""
