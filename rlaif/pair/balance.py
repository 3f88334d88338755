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

CLASSES = ("benign", "borderline", "harmful")
TEXT_ONLY = "refusal-text"
BORDERLINE = "a borderline prompt is for people to decide"
TOO_MANY = "guard: more refusals would be chosen than there are harmful prompts"


def classes(verdicts: pl.DataFrame) -> pl.DataFrame:
    """What each answer was classified as. Columns: key, answers (refuse | partial | comply). A model's word goes over
    the text classifier's, the newest over older ones."""
    told = verdicts.filter((pl.col("kind") == "classify") & pl.col("label").is_not_null())
    return (
        told.with_columns(by_model=pl.col("judge") != TEXT_ONLY)
        .sort("by_model", maintain_order=True)
        .unique("a", keep="last", maintain_order=True)
        .select(key="a", answers="label")
    )


def with_classes(pairs: pl.DataFrame, tags: pl.DataFrame, answers: pl.DataFrame) -> pl.DataFrame:
    """``pairs`` plus prompt_class (null where it has no such tag), answers_a and answers_b (null where unknown)."""
    names = pl.col("tags").list
    kind = pl.coalesce(
        *(pl.when(names.contains(name)).then(pl.lit(name)) for name in reversed(CLASSES)), pl.lit(None, pl.String)
    )  # of several tags the strictest
    by_prompt = tags.select("prompt_id", prompt_class=kind)
    return (
        pairs.join(by_prompt, on="prompt_id", how="left")
        .join(answers.rename({"key": "a", "answers": "answers_a"}), on="a", how="left")
        .join(answers.rename({"key": "b", "answers": "answers_b"}), on="b", how="left")
    )


def _chosen(winner: str) -> pl.Expr:
    return pl.when(pl.col(winner) == "a").then("answers_a").when(pl.col(winner) == "b").then("answers_b")


def _forbidden() -> pl.Expr:
    """Why judges may not choose what they chose, or null."""
    chosen, kind = _chosen("preferred"), pl.col("prompt_class")
    return (
        pl.when((kind == "benign") & (chosen == "refuse"))
        .then(pl.lit("guard: the refusal of a benign prompt may not be chosen"))
        .when((kind == "harmful") & (chosen == "comply"))
        .then(pl.lit("guard: compliance with a harmful prompt may not be chosen"))
    )


def guard(pairs: pl.DataFrame, *, classed: bool) -> pl.DataFrame:
    """``pairs`` (with pair_id, as :func:`with_classes` gives them) with what may not be chosen no
    longer kept, and ``only_people`` (why judges may not decide, or null).

    Refusals chosen for prompts of no known class are left out too, the least sure first, as far as there would be more
    refusals than harmful prompts. Where no prompt is ``classed`` there is nothing to hold them against.
    """
    barred = pl.col("kept") & _forbidden().is_not_null()
    pairs = pairs.with_columns(
        kept=pl.col("kept") & ~barred,
        why=pl.when(barred).then(_forbidden()).otherwise("why"),
        only_people=pl.when((pl.col("prompt_class") == "borderline").fill_null(False)).then(pl.lit(BORDERLINE)),
    )
    if not classed:
        return pairs
    over = pl.col("pair_id").is_in(_surplus(pairs.filter("kept"))["pair_id"].implode())
    return pairs.with_columns(kept=pl.col("kept") & ~over, why=pl.when(over).then(pl.lit(TOO_MANY)).otherwise("why"))


def _surplus(kept: pl.DataFrame) -> pl.DataFrame:
    """The refusals chosen for prompts of no known class beyond those that the harmful prompts leave room for."""
    refusing = kept.filter(_chosen("preferred") == "refuse")
    loose = refusing.filter(pl.col("prompt_class").is_null())
    room = kept.filter(pl.col("prompt_class") == "harmful").height - (refusing.height - loose.height)
    sure = pl.max_horizontal("p_a", 1.0 - pl.col("p_a"))
    return loose.sort(sure, "a", "b", descending=[True, False, False]).slice(max(0, room))


def guard_labels(routed: pl.DataFrame, *, classed: bool) -> pl.DataFrame:
    """The guard once more, over what judges label after people's labels put them right: a label that was turned round
    may be one that may not be chosen."""
    barred = (pl.col("route") == "judge") & _forbidden().is_not_null()
    over = pl.lit(False)
    if classed:
        judged = routed.filter((pl.col("route") == "judge") & ~barred)
        over = pl.col("pair_id").is_in(_surplus(judged)["pair_id"].implode())
    return routed.with_columns(
        route=pl.when(barred | over).then(pl.lit("dropped")).otherwise("route"),
        route_reason=pl.when(barred).then(_forbidden()).when(over).then(pl.lit(TOO_MANY)).otherwise("route_reason"),
    )


def table(labelled: pl.DataFrame) -> list[dict[str, str | int]]:
    """Of the rows that are labelled (``winner`` a | b): how many were chosen of each kind, for each kind of prompt.
    Rows: prompt, chosen, pairs. Empty where neither prompts nor answers have a class."""
    known = labelled.filter(pl.col("winner").is_not_null())
    if known["prompt_class"].is_null().all() and _all_unknown(known):
        return []
    counted = (
        known.select(prompt=pl.col("prompt_class").fill_null("unknown"), chosen=_chosen("winner").fill_null("unknown"))
        .group_by("prompt", "chosen")
        .agg(pairs=pl.len())
        .sort("prompt", "chosen")
    )
    return counted.to_dicts()


def _all_unknown(pairs: pl.DataFrame) -> bool:
    return bool(pairs["answers_a"].is_null().all() and pairs["answers_b"].is_null().all())
