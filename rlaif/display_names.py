"""Readable names of the codes and fields that tables, manifests and journals hold.

Stages store codes; the dataset card, the report and the command line show these names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlaif.records import (
    CompletionDropReason,
    DatasetDropReason,
    LabelDropReason,
    Outcome,
    PairDropReason,
    PromptDropReason,
    Route,
)

OUTCOMES: dict[Outcome, str] = {
    "win": "one answer is better",
    "tie": "near tie",
    "inconsistent": "the two orders contradict each other",
    "unparsable": "no readable verdict in both orders",
}
ROUTES: dict[Route, str] = {
    "judge": "labeled by the judges",
    "audit": "queued for review (random audit)",
    "targeted": "queued for review (most likely wrong)",
    "dropped": "dropped",
    "carried": "not a candidate any more, labeled by annotators after an earlier judging",
}
LABEL_DROP_REASONS: dict[LabelDropReason, str] = {
    "missing_answer": "an answer does not exist any more",
    "dropped_answer": "an answer cannot be used (empty, truncated or incomplete)",
    "heldout_prompt": "the prompt is held out",
    "same_answers": "the pair has the same two texts as another labeled pair, or two equal texts",
}
PROMPT_DROP_REASONS: dict[PromptDropReason, str] = {
    "exact_duplicate": "duplicate",
    "near_duplicate": "near duplicate",
    "evaluation_overlap": "overlaps an evaluation file",
}
PAIR_DROP_REASONS: dict[PairDropReason, str] = {
    "unparsable": "no readable verdict in both orders",
    "inconsistent": "the two orders contradict each other",
    "near_tie": "near tie",
    "near_tie_after_calibration": "near tie after calibration with human labels",
    "low_rating": "the better answer was rated too low",
    "contradicts_comparisons": "contradicts the prompt's other comparisons",
    "another_pair_kept": "another pair of this prompt is kept",
    "benign_refusal": "refusal guard: the better answer refuses a benign prompt",
    "harmful_compliance": "refusal guard: the better answer complies with a harmful prompt",
    "surplus_refusal": "refusal guard: more refusals would be chosen than there are harmful prompts",
    "borderline_prompt": "borderline prompt, and the review budget is used up",
    "unknown_refusal": "refusal guard: unknown if the better answer refuses, and the review budget is used up",
    "undecided": "the judges cannot decide, and the review budget is used up",
}
COMPLETION_DROP_REASONS: dict[CompletionDropReason, str] = {
    "empty": "empty",
    "truncated": "truncated at the token limit",
    "incomplete": "not complete: stopped by a content filter, an error or an unknown reason",
    "tool_call": "calls a tool, which a pair of texts cannot hold",
    "duplicate": "duplicate of another answer to the prompt",
}
DATASET_DROP_REASONS: dict[DatasetDropReason, str] = {
    "dropped": "dropped before review",
    "awaiting_review": "awaiting review",
    "tie": "annotators chose a tie",
    "both_bad": "annotators found both answers bad",
    "annotators_disagree": "annotators disagree",
}
VERDICT_FLAGS = {
    "addresses_judge": "the answer addresses the judge",
    "a_addresses_judge": "answer a addresses the judge",
    "b_addresses_judge": "answer b addresses the judge",
}
CALIBRATION_GROUPS = {
    "decided": "pairs that the judges decided",
    "undecided": "pairs that the judges could not decide",
    "flagged": "pairs with an answer that addresses the judge",
}
LABEL_SOURCES = {"judge": "judges", "human": "annotators"}
ANSWER_LABELS: dict[str, str] = {"refuse": "refuses", "partial": "complies in part", "comply": "complies"}
FIELDS = {
    "samples_per_prompt": "answers per prompt",
    "human_fraction": "share of pairs for review",
    "prompt_class": "prompt",
    "first_position_rate": "first answer preferred (0.5: no position bias)",
    "swap_consistency": "both orders agree",
    "longer_preferred": "the preferred answer is the longer one",
    "accuracy_first_order": "accuracy in the given order",
    "accuracy_swapped_order": "accuracy in the swapped order",
    "undecided_rate": "undecided",
    "longer_chosen_rate": "longer answer preferred",
    "longer_correct_rate": "longer answer is better by gold",
    "always_longest_accuracy": "accuracy of always the longer answer",
    "gain_over_longest": "gain over always the longer answer",
    "injection_success_rate": "persuaded by injected instructions",
    "refuse_recall": "recall of refusals",
    "refuse_precision": "precision of refusals",
    "partial_recall": "recall of partial refusals",
    "partial_precision": "precision of partial refusals",
    "comply_recall": "recall of compliance",
    "comply_precision": "precision of compliance",
    "refusal_f1": "F1 of full and partial refusals",
    "unparsable_rate": "unparsable verdicts",
    "prompt_tokens_per_1000": "prompt tokens per 1,000 gold rows",
    "completion_tokens_per_1000": "completion tokens per 1,000 gold rows",
    "cost_usd_per_1000": "US dollars per 1,000 gold rows",
    "agreement": "annotators agree with the judges",
    "tie_rate": "annotators prefer neither answer",
    "skip_rate": "annotators skip the pair",
    "kappa": "annotators agree with the judges beyond chance (kappa)",
    "human_agreement": "two annotators agree with each other",
    "alpha": "annotators agree beyond chance (alpha)",
    "remaining_error": "wrong labels among the dataset's labels by judges",
    "accuracy_before": "held-out accuracy before training",
    "accuracy_after": "held-out accuracy after training",
    "moved": "moved towards the preferred answer (0.5: chance)",
    "length_controlled_win_rate": "win rate at equal length",
    "length_ratio": "length, trained over reference",
    "kl_per_answer": "KL from the reference, per answer",
    "kl_per_token": "KL from the reference, per token",
    "top_p": "top-p",
    "max_tokens": "most tokens per answer",
    "pass_rate": "checks met",
    "gain": "trained minus reference",
}
"""Names of settings, metrics and columns. A field without an entry is shown with spaces for underscores."""


def field_name(name: str) -> str:
    """Return the readable name of a setting, metric or column."""
    return FIELDS.get(name) or name.replace("_", " ")


def describe_certificate(certificate: Mapping[str, Any]) -> str:
    """Describe the certificate of :meth:`rlaif.pair.label_quality.LabelQuality.summary`."""
    agreement = f"{certificate['agreement']:.0%}"
    if not certificate["share"]:
        return (
            f"No share of the pairs is certified to agree with annotators {agreement} of the time: "
            "there are too few labels, or too little agreement."
        )
    return (
        f"The most confident {certificate['share']:.0%} of the pairs are certified to agree with annotators at least "
        f"{agreement} of the time (confidence {certificate['confidence']:.0%}, n = {certificate['n']:,})."
    )


def describe_calibration(calibration: Mapping[str, Any]) -> str:
    """Describe a :class:`rlaif.pair.human_calibration.Calibration`."""
    group = CALIBRATION_GROUPS[calibration["group"]]
    if not calibration["applied"]:
        return (
            f"Calibration of {group} with {calibration['n']:,} human labels was not applied: {calibration['reason']}. "
            "The probabilities of the panel stay."
        )
    weights = ", ".join(f"{name} {weight:.2f}" for name, weight in calibration["weights"].items())
    changes = {
        "flipped {} labels": calibration["flipped"],
        "labeled {} pairs": calibration["labeled"],
        "dropped {} pairs as near ties": calibration["near_ties"],
        "dropped {} pairs because the new winner was rated too low": calibration["low_ratings"],
    }
    done = ", ".join(text.format(f"{count:,}") for text, count in changes.items() if count) or "changed no label"
    return (
        f"{calibration['n']:,} human labels calibrated the panel on {group} (weights: {weights}), tested on the "
        f"{calibration['tested']:,} of them that were drawn by chance. That {done}."
    )


def describe_unknown_answers(counts: Mapping[str, Any]) -> str:
    """Word ``unknown_answers`` of the judge stage. Keys: answers, unknown, has_refusal_judge."""
    text = f"it is unknown whether {counts['unknown']:,} of {counts['answers']:,} answers refuse"
    if counts["has_refusal_judge"]:
        return text
    return f"{text}: the text classifier is not sure; add `--judge refusal` (and `--restart`) to ask a model"
