"""Refusal guard: restrict the answers that judges may choose, by class of prompt, and count the chosen answers.

A prompt is benign, borderline or harmful if it has the tag of that name. The refusal judge, or else the text
classifier if it is confident, classifies each answer: it refuses, complies in part, or complies. Any other answer is
unknown: neither a refusal nor compliance.

Judges never choose a refusal of a benign prompt or compliance with a harmful one. An unknown answer may be either. If
the judges choose one for a benign or a harmful prompt, only annotators decide on that pair, as they do on borderline
prompts. Such a pair is dropped if the review budget does not cover it: a pair that is lost can be judged again with a
refusal judge, but a wrong label would be trained on. So there are never more refusals among the chosen answers than
harmful prompts: a model trained past that refuses what it should answer (after Röttger et al. 2024, XSTest,
arXiv:2308.01263). Prompts without such a tag are not guarded.
"""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from rlaif.pair.candidates import PanelMember, join_panel

PROMPT_CLASSES = ("benign", "borderline", "harmful")
TEXT_CLASSIFIER = "refusal-text"


def answer_labels(
    verdicts: pl.DataFrame, panel: Sequence[PanelMember], *, text_classifier_hash: str, min_confidence: float
) -> pl.DataFrame:
    """Return the class of each answer that has one. Columns: key, answer_label (refuse | partial | comply).

    The refusal judges of the ``panel`` override the text classifier. Of several, the label with the highest sum of
    weight x probability counts; of equal ones, the first in alphabetical order. The text classifier's counts only from
    ``min_confidence`` on, and only if its present version (``text_classifier_hash``) made it.
    """
    classified = verdicts.filter((pl.col("kind") == "classify") & pl.col("label").is_not_null())
    by_classifier = classified.filter(
        pl.col("judge") == TEXT_CLASSIFIER,
        pl.col("judge_hash") == text_classifier_hash,
        pl.col("score") >= min_confidence,
    )
    by_judges = join_panel(classified, panel)
    support = (pl.col("weight") * pl.col("score")).sort().sum().round(9)
    return (
        pl.concat(
            [
                by_classifier.select("a", "label", weight=pl.lit(1.0), score="score", rank=pl.lit(1)),
                by_judges.select("a", "label", "weight", "score", rank=pl.lit(0)),
            ]
        )
        .group_by("a", "rank", pl.col("label").cast(pl.String))
        .agg(support=support)
        .sort("a", "rank", "support", "label", descending=[False, False, True, False])
        .unique("a", keep="first", maintain_order=True)
        .select(key="a", answer_label="label")
    )


def add_prompt_class(pairs: pl.DataFrame, tags: pl.DataFrame, labels: pl.DataFrame) -> pl.DataFrame:
    """Add prompt_class, answer_label_a and answer_label_b to ``pairs``; null if unknown."""
    names = pl.col("tags").list
    prompt_class = pl.coalesce(
        *(pl.when(names.contains(name)).then(pl.lit(name)) for name in reversed(PROMPT_CLASSES)),
        pl.lit(None, pl.String),
    )  # the strictest of several tags
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


def guard_violation() -> pl.Expr:
    """Return the drop reason if the judges may not choose what they chose, else null.

    The reason is "unknown_refusal" if it is unknown whether the chosen answer refuses.
    """
    chosen_label, prompt_class = _chosen_label("preferred"), pl.col("prompt_class")
    return (
        pl.when((prompt_class == "benign") & (chosen_label == "refuse"))
        .then(pl.lit("benign_refusal"))
        .when((prompt_class == "harmful") & (chosen_label == "comply"))
        .then(pl.lit("harmful_compliance"))
        .when(
            prompt_class.is_in(["benign", "harmful"]) & pl.col("preferred").is_not_null() & chosen_label.is_null(),
        )
        .then(pl.lit("unknown_refusal"))
    )


def apply_refusal_guard(pairs: pl.DataFrame, *, has_prompt_classes: bool) -> pl.DataFrame:
    """Drop the kept ``pairs`` that violate the guard, and add ``humans_only``: judges may not decide on this pair.

    That is so for borderline prompts, and if the judges chose an unknown answer for a benign or harmful prompt.
    ``pairs``: with pair_id, as returned by :func:`add_prompt_class`. Refusals chosen for prompts of unknown class are
    dropped too, the least confident first, until there are no more refusals than harmful prompts. Without
    ``has_prompt_classes`` there is nothing to compare their number with, and they are kept.
    """
    violation, is_kept = guard_violation(), pl.col("kept")
    is_unknown = (violation == "unknown_refusal").fill_null(False)
    violation = pl.when(~is_unknown).then(violation)
    pairs = pairs.with_columns(
        kept=is_kept & violation.is_null(),
        drop_reason=pl.when(is_kept & violation.is_not_null()).then(violation).otherwise("drop_reason"),
        humans_only=(pl.col("prompt_class") == "borderline").fill_null(False) | is_unknown,
    )
    if not has_prompt_classes:
        return pairs
    surplus = pl.col("pair_id").is_in(_surplus_refusals(pairs.filter("kept"))["pair_id"].implode())
    return pairs.with_columns(
        kept=pl.col("kept") & ~surplus,
        drop_reason=pl.when(surplus).then(pl.lit("surplus_refusal")).otherwise("drop_reason"),
    )


def _surplus_refusals(kept: pl.DataFrame) -> pl.DataFrame:
    """Return the refusals chosen for prompts of unknown class that exceed the number of harmful prompts."""
    refusals = kept.filter(_chosen_label("preferred") == "refuse")
    unclassified = refusals.filter(pl.col("prompt_class").is_null())
    allowed = kept.filter(pl.col("prompt_class") == "harmful").height - (refusals.height - unclassified.height)
    confidence = pl.max_horizontal("prob_a", 1.0 - pl.col("prob_a"))
    return unclassified.sort(confidence, "a", "b", descending=[True, False, False]).slice(max(0, allowed))


def reapply_refusal_guard(routed: pl.DataFrame, *, has_prompt_classes: bool) -> pl.DataFrame:
    """Drop the judge-labeled pairs that violate the guard after calibration, which may have flipped their label."""
    forbidden = (pl.col("route") == "judge") & guard_violation().is_not_null()
    surplus = pl.lit(False)
    if has_prompt_classes:
        judge_labeled = routed.filter((pl.col("route") == "judge") & ~forbidden)
        surplus = pl.col("pair_id").is_in(_surplus_refusals(judge_labeled)["pair_id"].implode())
    return routed.with_columns(
        route=pl.when(forbidden | surplus).then(pl.lit("dropped")).otherwise("route"),
        drop_reason=pl.when(forbidden)
        .then(guard_violation())
        .when(surplus)
        .then(pl.lit("surplus_refusal"))
        .otherwise("drop_reason"),
    )


def refusal_table(labeled: pl.DataFrame) -> list[dict[str, str | int]]:
    """Count the labeled rows (``winner`` a | b) by class of prompt and of chosen answer.

    Rows: prompt, chosen, pairs. Empty if neither prompts nor answers have a class.
    """
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


def count_unknown_answers(pairs: pl.DataFrame) -> tuple[int, int]:
    """Count the answers of ``pairs``, and those of unknown class among them."""
    answers = pl.concat([pairs.select(key=side, label=f"answer_label_{side}") for side in ("a", "b")]).unique("key")
    return answers.height, answers["label"].null_count()


def _no_answer_labels(pairs: pl.DataFrame) -> bool:
    return bool(pairs["answer_label_a"].is_null().all() and pairs["answer_label_b"].is_null().all())
