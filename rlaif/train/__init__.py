"""``rlaif train``: train a model on the dataset."""
