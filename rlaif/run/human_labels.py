"""Combine the human labels of each pair: an adjudicator overrides the annotators, otherwise the majority wins.

The dataset and the training both use this function, so that they agree.
"""

from __future__ import annotations

import polars as pl


def human_labels(reviews: pl.DataFrame) -> pl.DataFrame:
    """Return one row per reviewed pair.

    Columns: pair_id, label (a | b | tie | both_bad | disagreement), num_annotators (annotators who labeled the pair),
    decided_by (adjudicated | single | majority), edited_response and editor: the better answer written by an annotator
    who agrees with the label, and that annotator's name.

    The newest label of each annotator counts. Skips and labels of gold pairs do not.
    """
    reviews = _add_missing_columns(reviews)
    latest = (
        reviews.filter(pl.col("route").ne_missing("gold"))
        .sort("created_at", maintain_order=True)
        .unique(["pair_id", "annotator", "role"], keep="last", maintain_order=True)
        .filter(pl.col("choice") != "skip")
        .with_columns(label=pl.coalesce("preferred", "choice"), is_adjudicator=pl.col("role") == "adjudicator")
        # The newest adjudication overrides all other labels of its pair.
        .with_columns(has_adjudication=pl.col("is_adjudicator").any().over("pair_id"))
    )
    votes = (
        latest.filter(pl.col("is_adjudicator") == pl.col("has_adjudication"))
        .filter(~pl.col("is_adjudicator") | (pl.int_range(pl.len()) == pl.int_range(pl.len()).max()).over("pair_id"))
        .with_columns(num_votes=pl.len().over("pair_id"), num_same_label=pl.len().over("pair_id", "label"))
        .with_columns(is_majority=pl.col("num_same_label") * 2 > pl.col("num_votes"))
    )
    wins, edits = pl.col("is_majority"), pl.col("is_majority") & pl.col("edited_response").is_not_null()
    annotators = latest.group_by("pair_id").agg(num_annotators=pl.col("annotator").n_unique())
    decisions = votes.group_by("pair_id").agg(
        label=pl.col("label").filter(wins).first(),
        decided_by=pl.when(pl.col("is_adjudicator").any())
        .then(pl.lit("adjudicated"))
        .when(pl.len() > 1)
        .then(pl.lit("majority"))
        .otherwise(pl.lit("single")),
        edited_response=pl.col("edited_response").filter(edits).last(),
        editor=pl.col("annotator").filter(edits).last(),
    )
    return (
        decisions.join(annotators, on="pair_id")
        .with_columns(label=pl.col("label").fill_null("disagreement"))
        .select("pair_id", "label", "num_annotators", "decided_by", "edited_response", "editor")
    )


def _add_missing_columns(reviews: pl.DataFrame) -> pl.DataFrame:
    """Fill in fields that older labels do not have."""
    missing = [name for name in ("edited_response", "role", "route") if name not in reviews.columns]
    return reviews.with_columns(pl.lit(None, pl.String).alias(name) for name in missing).with_columns(
        pl.col("role").fill_null("annotator")
    )
