"""Kahneman-Tversky optimization (Ethayarajh et al. 2024, arXiv:2402.01306): answers that are good or bad by themselves.

Every pair gives one good and one bad answer. Pairs that annotators labeled both bad give two bad answers; no other
method uses them.

The KL term is estimated from prompts paired with answers to other prompts. TRL takes these from the same batch on the
device and does not shuffle the rows, so their order (:func:`order_rows_for_kl`) is part of the method.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import orjson

from rlaif.config.models import TrainConfig
from rlaif.records import content_key, hash_to_unit_interval
from rlaif.train import chat_template
from rlaif.train.methods import base

if TYPE_CHECKING:
    import polars as pl

    from rlaif.run.run import Run

display_name = "KTO"
trainer_class = "KTOTrainer"
config_class = "KTOConfig"
row_unit = "answers"
head: base.Head = "language"
drops_overlong_pairs = False
default_learning_rates = (1e-4, 1e-6)
trl_fields: Mapping[str, str] = {"loss_type": "loss", "beta": "beta"}


def config_kwargs(train: TrainConfig) -> dict[str, Any]:
    return {"loss_type": base.resolve_losses(display_name, config_class, train, "kto")[0], "beta": train.beta}


def trainer_kwargs(_train: TrainConfig) -> dict[str, Any]:
    return {}


def build_dataset(frame: pl.DataFrame, run: Run, _train: TrainConfig, seed: int) -> base.TrainerDataset:
    examples = []
    for row in frame.iter_rows(named=True):
        turns = chat_template.to_chat_turns(row)
        examples += [
            {"prompt": turns["prompt"], "completion": turns[side], "label": side == "chosen", "tools": row.get("tools")}
            for side in ("chosen", "rejected")
        ]
    bad = both_bad_pairs(run)
    for pair in bad:
        answers = ([{"role": "assistant", "content": pair[side]}] for side in ("response_a", "response_b"))
        turns = chat_template.to_chat_turns(
            dict(zip(chat_template.SIDES, (orjson.loads(pair["prompt"]), *answers), strict=True))
        )
        examples += [
            {"prompt": turns["prompt"], "completion": turns[side], "label": False, "tools": None}
            for side in ("chosen", "rejected")
        ]
    dataset = base.conversation_dataset(order_rows_for_kl(examples, seed), ("prompt", "completion"), label="bool")
    return base.TrainerDataset(
        dataset, extra_identity={"both_bad": content_key(pairs=[pair["pair_id"] for pair in bad])}
    )


def order_rows_for_kl(rows: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Return ``rows`` in a random order that depends on their texts, with the rows of a prompt evenly spaced.

    Row j of a prompt's m rows is placed at the fraction (draw + j) / m of the order. So about 1 / m of all rows are
    between two of them.
    """
    by_prompt: dict[str, list[tuple[float, dict[str, Any]]]] = defaultdict(list)
    for row in rows:
        texts = (orjson.dumps(row[name], option=orjson.OPT_SORT_KEYS) for name in ("prompt", "completion"))
        prompt, answer = (text.decode() for text in texts)
        by_prompt[prompt].append((hash_to_unit_interval(seed, "kto", prompt, answer, row["label"]), row))
    positioned: list[tuple[float, dict[str, Any]]] = []
    for prompt, prompt_rows in by_prompt.items():
        draw = hash_to_unit_interval(seed, "kto", prompt)
        prompt_rows.sort(key=itemgetter(0))
        positioned += [((draw + j) / len(prompt_rows), row) for j, (_, row) in enumerate(prompt_rows)]
    return [row for _, row in sorted(positioned, key=itemgetter(0))]


def both_bad_pairs(run: Run) -> list[dict[str, Any]]:
    """Return the pairs that annotators labeled both bad, without those of the test split."""
    import polars as pl

    from rlaif.run.human_labels import human_labels

    reviews = run.reviews()
    if not reviews.height or not run.pairs_path.exists():
        return []
    pair_ids = human_labels(reviews).filter(pl.col("label") == "both_bad")["pair_id"].to_list()
    pairs = pl.scan_parquet(run.pairs_path).filter(pl.col("pair_id").is_in(pair_ids)).collect()
    if "split" in pairs.columns:  # not in a table of an earlier version
        pairs = pairs.filter(pl.col("split") == "train")
    test = run.dataset / "test.parquet"
    if test.exists():
        test_prompt_ids = pl.read_parquet(test, columns=["prompt_id"])["prompt_id"].to_list()
        pairs = pairs.filter(~pl.col("prompt_id").is_in(test_prompt_ids))
    return pairs.sort("pair_id").to_dicts()


def describe(train: TrainConfig) -> str:
    return f"KTO, loss {(train.loss or ['kto'])[0]}, beta {train.beta:g}"
