"""Stage ``rlaif judge``: read judge files, ask judge models, and parse their replies into verdicts."""
