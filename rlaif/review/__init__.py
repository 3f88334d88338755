"""``rlaif review``: the queue that people label, blind, and the files it travels in."""
