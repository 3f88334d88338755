"""Rates at which annotators agree with the judges, find no better answer, or skip, over all kept pairs.

The dataset's report and the lead's dashboard both use :func:`estimate_agreement`, so they show the same figures.

Every kept pair has a known probability of being drawn for review. Pairs of similar probability form a stratum of known
size (:func:`add_stratum`), and pairs drawn with certainty are a stratum of their own: if all of them have a label, that
part of the population is known exactly. In the others, each label counts by the inverse of its probability. Labels that
are still missing are missing at random within a route, because the queue's order is random.
"""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from rlaif.stats import Estimate, Stratum, stratified_mean

MAX_RATIO = 4.0
"""Probabilities that differ by more than this factor, with none between them, are of different strata."""
QUEUED = ("audit", "targeted")


@dataclass(frozen=True)
class HumanAgreement:
    """Figures over the kept pairs that the judges decided; None if the labels do not tell.

    ``agreement``: share of the judges' choices that annotators share, where annotators choose. ``tie_rate``: share of
    pairs in which annotators prefer neither answer (a tie, or both bad). ``skip_rate``: share of pairs that annotators
    skip. The other two figures assume that skipped pairs are like the others, so they mean less the more are skipped.
    """

    agreement: Estimate | None
    tie_rate: Estimate | None
    skip_rate: Estimate | None


def estimate_agreement(pairs: pl.DataFrame, labels: pl.DataFrame, reviews: pl.DataFrame) -> HumanAgreement:
    """Estimate the figures.

    ``pairs``: all kept pairs, with pair_id, route, inclusion_probability and preferred_by_judges; others are ignored.
    ``labels``: :func:`rlaif.run.human_labels.human_labels`. ``reviews``: the reviews journal, for the skips.
    """
    shown = labels.select("pair_id", "label")
    if reviews.height:
        skips = reviews.filter(pl.col("choice") == "skip").select("pair_id", label=pl.lit("skip")).unique()
        shown = pl.concat([shown, skips.join(shown, on="pair_id", how="anti")])
    population = judged_population(pairs)
    labeled = weigh(population, shown.filter(pl.col("label") != "skip"))
    agrees = pl.col("label") == pl.col("preferred_by_judges")
    return HumanAgreement(
        agreement=_stratified(population, labeled, agrees, pl.col("label").is_in(["a", "b"])),
        tie_rate=_stratified(population, labeled, pl.col("label").is_in(["tie", "both_bad"])),
        skip_rate=_stratified(population, weigh(population, shown), pl.col("label") == "skip"),
    )


def judged_population(pairs: pl.DataFrame) -> pl.DataFrame:
    """Return the pairs that could be drawn for review and that the judges decided, with their stratum."""
    return add_stratum(
        pairs.filter(pl.col("inclusion_probability").is_not_null() & pl.col("preferred_by_judges").is_not_null())
    )


def add_stratum(pairs: pl.DataFrame) -> pl.DataFrame:
    """Add ``stratum`` to ``pairs``: an integer that depends on the inclusion probabilities of all pairs alone.

    A few labels of low probability represent many pairs, and often none of them is drawn. The strata make that visible,
    while the mean weight of the labels that were drawn does not.
    """
    probabilities = pairs.select(pl.col("inclusion_probability").unique().sort()).to_series()
    strata, stratum, previous = [], 0, 0.0
    for probability in probabilities:
        if previous and (probability > MAX_RATIO * previous or (probability >= 1 - 1e-9 and previous < 1 - 1e-9)):
            stratum += 1
        strata.append(stratum)
        previous = probability
    table = pl.DataFrame({"inclusion_probability": probabilities, "stratum": pl.Series(strata, dtype=pl.Int64)})
    return pairs.join(table, on="inclusion_probability", how="left", maintain_order="left")


def weigh(population: pl.DataFrame, labels: pl.DataFrame) -> pl.DataFrame:
    """Return the queued pairs of ``population`` with a label, sorted by id, with ``weight``.

    A label counts by the inverse of the probability that its pair was drawn and that a drawn pair of its route has a
    label. ``labels``: pair_id, label.
    """
    queue = population.filter(pl.col("route").is_in(QUEUED)).join(
        labels.select("pair_id", "label"), on="pair_id", how="left", maintain_order="left"
    )
    response_rate = pl.col("label").is_not_null().mean().over("route")
    weighted = queue.with_columns(weight=1.0 / (pl.col("inclusion_probability") * response_rate))
    return weighted.filter(pl.col("label").is_not_null()).sort("pair_id")


def _stratified(
    population: pl.DataFrame, labeled: pl.DataFrame, value: pl.Expr, in_domain: pl.Expr | None = None
) -> Estimate | None:
    """Estimate the mean of ``value`` over the pairs with ``in_domain``, or over all."""
    rows = labeled.select(
        "stratum",
        "weight",
        value=value.fill_null(value=False).cast(pl.Float64),
        in_domain=(pl.lit(value=True) if in_domain is None else in_domain).cast(pl.Float64),
    )
    strata = []
    for stratum, size in population.group_by("stratum").len().sort("stratum").iter_rows():
        observed = rows.filter(pl.col("stratum") == stratum)
        strata.append(
            Stratum(
                size,
                observed["value"].to_numpy(),
                observed["weight"].to_numpy(),
                None if in_domain is None else observed["in_domain"].to_numpy(),
            )
        )
    return stratified_mean(strata)
