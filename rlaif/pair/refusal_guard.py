"""The refusal guard: what kind of answer may be chosen for what kind of prompt, and the table that shows it.

A prompt is benign, borderline or harmful by its tag of that name; an answer refuses, complies in part or complies by
the refusal judge, or by the text classifier before it. On a benign prompt a refusal is never chosen by judges, on a
harmful one compliance is not, and a borderline one is for people alone. So the refusing answers among the chosen are
never more than the harmful prompts (after Röttger et al. 2024, XSTest, arXiv:2308.01263: a model trained past that
refuses what it should answer). A prompt without such a tag, or an answer that nothing was told about, has no guard:
they are counted and shown.
"""

from __future__ import annotations

import polars as pl

PROMPT_CLASSES = ("benign", "borderline", "harmful")
TEXT_CLASSIFIER = "refusal-text"
REASON_BORDERLINE = "a borderline prompt is for people to decide"
REASON_TOO_MANY_REFUSALS = "guard: more refusals would be chosen than there are harmful prompts"


def answer_labels(verdicts: pl.DataFrame) -> pl.DataFrame:
    """What each answer was classified as. Columns: key, answer_label (refuse | partial | comply). A model's word goes
    over the text classifier's, the newest over older ones."""
    classified = verdicts.filter((pl.col("kind") == "classify") & pl.col("label").is_not_null())
    return (
        classified.with_columns(is_model_verdict=pl.col("judge") != TEXT_CLASSIFIER)
        .sort("is_model_verdict", maintain_order=True)
        .unique("a", keep="last", maintain_order=True)
        .select(key="a", answer_label="label")
    )


def add_prompt_class(pairs: pl.DataFrame, tags: pl.DataFrame, labels: pl.DataFrame) -> pl.DataFrame:
    """``pairs`` plus prompt_class (null where it has no such tag), answer_label_a and answer_label_b (null where
    unknown)."""
    names = pl.col("tags").list
    prompt_class = pl.coalesce(
        *(pl.when(names.contains(name)).then(pl.lit(name)) for name in reversed(PROMPT_CLASSES)),
        pl.lit(None, pl.String),
    )  # of several tags the strictest
    by_prompt = tags.select("prompt_id", prompt_class=prompt_class)
    return (
        pairs.join(by_prompt, on="prompt_id", how="left")
        .join(labels.rename({"key": "a", "answer_label": "answer_label_a"}), on="a", how="left")
        .join(labels.rename({"key": "b", "answer_label": "answer_label_b"}), on="b", how="left")
    )


def _chosen_label(winner_column: str) -> pl.Expr:
    return (
        pl.when(pl.col(winner_column) == "a")
        .then("answer_label_a")
        .when(pl.col(winner_column) == "b")
        .then("answer_label_b")
    )


def _guard_violation() -> pl.Expr:
    """Why judges may not choose what they chose, or null."""
    chosen_label, prompt_class = _chosen_label("preferred"), pl.col("prompt_class")
    return (
        pl.when((prompt_class == "benign") & (chosen_label == "refuse"))
        .then(pl.lit("guard: the refusal of a benign prompt may not be chosen"))
        .when((prompt_class == "harmful") & (chosen_label == "comply"))
        .then(pl.lit("guard: compliance with a harmful prompt may not be chosen"))
    )


def apply_refusal_guard(pairs: pl.DataFrame, *, has_prompt_classes: bool) -> pl.DataFrame:
    """``pairs`` (with pair_id, as :func:`add_prompt_class` gives them) with what may not be chosen no
    longer kept, and ``human_only_reason`` (why judges may not decide, or null).

    Refusals chosen for prompts of no known class are left out too, the least sure first, as far as there would be more
    refusals than harmful prompts. Where no prompt is classified there is nothing to hold them against.
    """
    forbidden = pl.col("kept") & _guard_violation().is_not_null()
    pairs = pairs.with_columns(
        kept=pl.col("kept") & ~forbidden,
        drop_reason=pl.when(forbidden).then(_guard_violation()).otherwise("drop_reason"),
        human_only_reason=pl.when((pl.col("prompt_class") == "borderline").fill_null(False)).then(
            pl.lit(REASON_BORDERLINE)
        ),
    )
    if not has_prompt_classes:
        return pairs
    surplus = pl.col("pair_id").is_in(_surplus_refusals(pairs.filter("kept"))["pair_id"].implode())
    return pairs.with_columns(
        kept=pl.col("kept") & ~surplus,
        drop_reason=pl.when(surplus).then(pl.lit(REASON_TOO_MANY_REFUSALS)).otherwise("drop_reason"),
    )


def _surplus_refusals(kept: pl.DataFrame) -> pl.DataFrame:
    """The refusals chosen for prompts of no known class beyond those that the harmful prompts leave room for."""
    refusals = kept.filter(_chosen_label("preferred") == "refuse")
    unclassified = refusals.filter(pl.col("prompt_class").is_null())
    allowed = kept.filter(pl.col("prompt_class") == "harmful").height - (refusals.height - unclassified.height)
    confidence = pl.max_horizontal("prob_a", 1.0 - pl.col("prob_a"))
    return unclassified.sort(confidence, "a", "b", descending=[True, False, False]).slice(max(0, allowed))


def reapply_refusal_guard(routed: pl.DataFrame, *, has_prompt_classes: bool) -> pl.DataFrame:
    """The guard once more, over what judges label after people's labels put them right: a label that was turned round
    may be one that may not be chosen."""
    forbidden = (pl.col("route") == "judge") & _guard_violation().is_not_null()
    surplus = pl.lit(False)
    if has_prompt_classes:
        judge_labeled = routed.filter((pl.col("route") == "judge") & ~forbidden)
        surplus = pl.col("pair_id").is_in(_surplus_refusals(judge_labeled)["pair_id"].implode())
    return routed.with_columns(
        route=pl.when(forbidden | surplus).then(pl.lit("dropped")).otherwise("route"),
        route_reason=pl.when(forbidden)
        .then(_guard_violation())
        .when(surplus)
        .then(pl.lit(REASON_TOO_MANY_REFUSALS))
        .otherwise("route_reason"),
    )


def refusal_table(labeled: pl.DataFrame) -> list[dict[str, str | int]]:
    """Of the rows that are labelled (``winner`` a | b): how many were chosen of each kind, for each kind of prompt.
    Rows: prompt, chosen, pairs. Empty where neither prompts nor answers have a class."""
    decided = labeled.filter(pl.col("winner").is_not_null())
    if decided["prompt_class"].is_null().all() and _no_answer_labels(decided):
        return []
    counts = (
        decided.select(
            prompt=pl.col("prompt_class").fill_null("unknown"), chosen=_chosen_label("winner").fill_null("unknown")
        )
        .group_by("prompt", "chosen")
        .agg(pairs=pl.len())
        .sort("prompt", "chosen")
    )
    return counts.to_dicts()


def _no_answer_labels(pairs: pl.DataFrame) -> bool:
    return bool(pairs["answer_label_a"].is_null().all() and pairs["answer_label_b"].is_null().all())
