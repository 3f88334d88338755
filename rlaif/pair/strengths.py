"""Strengths of the answers to one prompt, from comparisons of which some may be missing.

If every answer is compared with every other, the mean over its comparisons is its strength. If comparisons are missing,
that mean depends on whom an answer was compared with: an answer that only met the best one looks weak. Then the
strengths are fitted to the comparisons that exist, and the missing ones are predicted from them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import polars as pl

from rlaif.stats import fit_antisymmetric_logistic
from rlaif.stats.calibration import sigmoid
from rlaif.stats.intervals import Floats

RIDGE = 1e-4
"""Keeps the Bradley-Terry fit finite if an answer wins or loses everything, without a visible effect on the result."""

FitStrengths = Callable[[Floats, Floats], Floats]
"""From a row per comparison (1 for a, -1 for b, else 0) and its result for a to the strength of each answer."""


def scores_from_margins(pairs: pl.DataFrame) -> pl.DataFrame:
    """Return the score of each answer relative to the mean of its prompt. Columns: prompt_id, key, score.

    ``pairs``: prompt_id, a, b, score_a, score_b, of which a pair without a common judge has none. Without missing pairs
    that is the mean difference from all answers, itself included. Otherwise it is the least-squares solution of
    score(a) - score(b) = margin over the pairs that exist (HodgeRank: Jiang et al. 2011, arXiv:0811.1067). Answers that
    no chain of pairs connects are not comparable; each such group has mean zero.
    """
    margins = pairs.select("prompt_id", "a", "b", result=pl.col("score_a") - pl.col("score_b")).drop_nulls("result")
    total = pl.col("result").sum() / (pl.len() + 1)
    return _strengths(margins, -pl.col("result"), total, _least_squares).rename({"strength": "score"})


def mean_wins(judged: pl.DataFrame) -> pl.DataFrame:
    """Return the mean probability of each answer to beat another one of its prompt. Columns: prompt_id, key, strength.

    ``judged``: prompt_id, a, b, prob_a. In a complete round robin the order of mean wins is the order of the
    Bradley-Terry model (Ford 1957). If comparisons are missing, the model is fitted to those that exist, and an
    answer's strength is the mean of its predicted wins over all other answers, which in a complete round robin equals
    its mean wins: these are the model's likelihood equations.
    """
    results = judged.select("prompt_id", "a", "b", result="prob_a")
    return _strengths(results, 1.0 - pl.col("result"), pl.col("result").sort().mean(), _predicted_mean_wins)


def _strengths(results: pl.DataFrame, result_for_b: pl.Expr, mean: pl.Expr, fit: FitStrengths) -> pl.DataFrame:
    """Return ``mean`` of each answer's results, or, if a comparison of its prompt is missing, what ``fit`` returns."""
    own = pl.concat(
        [
            results.select("prompt_id", "result", key="a"),
            results.select("prompt_id", key="b", result=result_for_b).select("prompt_id", "result", "key"),
        ]
    )
    means = (
        own.group_by("prompt_id", "key", maintain_order=True)
        .agg(strength=mean, num_compared=pl.len())
        .with_columns(is_complete=(pl.col("num_compared") == pl.len() - 1).all().over("prompt_id"))
        .sort("prompt_id", "key")
    )
    incomplete = means.filter(~pl.col("is_complete"))
    fitted = [means.filter("is_complete").select("prompt_id", "key", "strength")]
    rows = results.join(incomplete.select("prompt_id").unique(), on="prompt_id", how="semi").sort("prompt_id", "a", "b")
    by_prompt = rows.partition_by("prompt_id", as_dict=True)
    for prompt, answers in incomplete.partition_by("prompt_id", as_dict=True, maintain_order=True).items():
        index = answers.select("key", index=pl.int_range(pl.len()))
        prompt_rows = (
            by_prompt[prompt]
            .join(index.rename({"key": "a", "index": "index_a"}), on="a", maintain_order="left")
            .join(index.rename({"key": "b", "index": "index_b"}), on="b", maintain_order="left")
        )
        design = np.zeros((prompt_rows.height, answers.height))
        comparisons = np.arange(prompt_rows.height)
        design[comparisons, prompt_rows["index_a"].to_numpy()] = 1.0
        design[comparisons, prompt_rows["index_b"].to_numpy()] = -1.0
        strength = fit(design, prompt_rows["result"].to_numpy())
        fitted.append(answers.select("prompt_id", "key", strength=pl.Series(strength)))
    return pl.concat(fitted).sort("prompt_id", "key")


def _least_squares(design: Floats, results: Floats) -> Floats:
    return np.asarray(np.linalg.lstsq(design, results, rcond=None)[0], dtype=np.float64)


def _predicted_mean_wins(design: Floats, results: Floats) -> Floats:
    strength = fit_antisymmetric_logistic(design, results, l2=RIDGE)
    wins = sigmoid(strength[:, None] - strength[None, :])
    result: Floats = (wins.sum(axis=1) - 0.5) / (len(strength) - 1)
    return result
