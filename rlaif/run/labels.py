"""What people's labels of a pair come to: an adjudicator's label over everybody's, else that of the majority.

Whoever asks what people say of a pair asks here, so that the dataset and a training give one answer.
"""

from __future__ import annotations

import polars as pl


def human_labels(reviews: pl.DataFrame) -> pl.DataFrame:
    """One row a reviewed pair. Columns: pair_id, label (a | b | tie | both_bad | disagreement), annotators (how many
    people's labels there are), decided (adjudicated | single | majority), edited and editor (the better answer that
    one of those whom the label agrees with wrote, and who).

    The newest label of an annotator counts; a skip is no label, and a label of a gold pair is none here.
    """
    reviews = _with_every_column(reviews)
    latest = (
        reviews.filter(pl.col("route").ne_missing("gold"))
        .sort("at", maintain_order=True)
        .unique(["pair_id", "annotator", "role"], keep="last", maintain_order=True)
        .filter(pl.col("choice") != "skip")
        .with_columns(label=pl.coalesce("preferred", "choice"), judge=pl.col("role") == "adjudicator")
        # The newest adjudication outranks all others of its pair.
        .with_columns(judged=pl.col("judge").any().over("pair_id"))
    )
    votes = (
        latest.filter(pl.col("judge") == pl.col("judged"))
        .filter(~pl.col("judge") | (pl.int_range(pl.len()) == pl.int_range(pl.len()).max()).over("pair_id"))
        .with_columns(votes=pl.len().over("pair_id"), alike=pl.len().over("pair_id", "label"))
        .with_columns(wins=pl.col("alike") * 2 > pl.col("votes"))
    )
    wins, edits = pl.col("wins"), pl.col("wins") & pl.col("edited").is_not_null()
    people = latest.group_by("pair_id").agg(annotators=pl.col("annotator").n_unique())
    decided = votes.group_by("pair_id").agg(
        label=pl.col("label").filter(wins).first(),
        decided=pl.when(pl.col("judge").any()).then(pl.lit("adjudicated"))
        .when(pl.len() > 1).then(pl.lit("majority")).otherwise(pl.lit("single")),
        edited=pl.col("edited").filter(edits).last(),
        editor=pl.col("annotator").filter(edits).last(),
    )  # fmt: skip
    return (
        decided.join(people, on="pair_id")
        .with_columns(label=pl.col("label").fill_null("disagreement"))
        .select("pair_id", "label", "annotators", "decided", "edited", "editor")
    )


def _with_every_column(reviews: pl.DataFrame) -> pl.DataFrame:
    """Labels from before a field was there have its default."""
    missing = [name for name in ("edited", "role", "route") if name not in reviews.columns]
    return reviews.with_columns(pl.lit(None, pl.String).alias(name) for name in missing).with_columns(
        pl.col("role").fill_null("annotator")
    )
