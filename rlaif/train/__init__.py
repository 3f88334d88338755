"""``rlaif train``: the dataset and a model in, a trained model out."""
