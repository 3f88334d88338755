"""Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv:2402.01306): answers that are good or bad by themselves.

Every pair gives one of each. Pairs that people called both bad, which a preference method has no use for, give two bad
ones: this is where they count.

The KL term is estimated from prompts with answers to other prompts. TRL takes those from the same batch on the device,
and goes through the rows as they stand: their order (:func:`spread`) is a part of the method.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import orjson

from rlaif.config import TrainConfig
from rlaif.records import key_of, unit_interval
from rlaif.train import method, template

if TYPE_CHECKING:
    import polars as pl

    from rlaif.run.directory import Run

TITLE = "KTO"
TRAINER = "KTOTrainer"
CONFIG = "KTOConfig"
UNIT = "answers"
HEAD: method.Head = "language"
WHOLE = False
RATES = (1e-4, 1e-6)
OWN: Mapping[str, str] = {"loss_type": "loss", "beta": "beta"}


def arguments(train: TrainConfig) -> dict[str, Any]:
    return {"loss_type": method.losses(TITLE, CONFIG, train, "kto")[0], "beta": train.beta}


def keywords(_train: TrainConfig) -> dict[str, Any]:
    return {}


def rows(frame: pl.DataFrame, run: Run, _train: TrainConfig, seed: int) -> method.Rows:
    made = []
    for row in frame.iter_rows(named=True):
        turns = template.conversation(row)
        made += [
            {"prompt": turns["prompt"], "completion": turns[side], "label": side == "chosen", "tools": row.get("tools")}
            for side in ("chosen", "rejected")
        ]
    bad = both_bad(run)
    for pair in bad:
        both = ([{"role": "assistant", "content": pair[side]}] for side in ("response_a", "response_b"))
        turns = template.conversation(dict(zip(template.SIDES, (orjson.loads(pair["prompt"]), *both), strict=True)))
        made += [
            {"prompt": turns["prompt"], "completion": turns[side], "label": False, "tools": None}
            for side in ("chosen", "rejected")
        ]
    dataset = method.conversations(spread(made, seed), ("prompt", "completion"), label="bool")
    return method.Rows(dataset, deciding={"both_bad": key_of(pairs=[pair["pair_id"] for pair in bad])})


def spread(rows: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """``rows`` in an order drawn by their texts, those to one prompt at even distances over the whole.

    Number j of a prompt's m rows stands at (draw + j) / m of the way, so that about all rows / m are between any two.
    """
    of_prompt: dict[str, list[tuple[float, dict[str, Any]]]] = defaultdict(list)
    for row in rows:
        texts = (orjson.dumps(row[name], option=orjson.OPT_SORT_KEYS) for name in ("prompt", "completion"))
        prompt, answer = (text.decode() for text in texts)
        of_prompt[prompt].append((unit_interval(seed, "kto", prompt, answer, row["label"]), row))
    placed: list[tuple[float, dict[str, Any]]] = []
    for prompt, own in of_prompt.items():
        draw = unit_interval(seed, "kto", prompt)
        own.sort(key=itemgetter(0))
        placed += [((draw + j) / len(own), row) for j, (_, row) in enumerate(own)]
    return [row for _, row in sorted(placed, key=itemgetter(0))]


def both_bad(run: Run) -> list[dict[str, Any]]:
    """The pairs that people called both bad, except of prompts that are held out for testing."""
    import polars as pl

    from rlaif.run.labels import human_labels

    reviews = run.reviews()
    if not reviews.height or not run.pairs_path.exists():
        return []
    named = human_labels(reviews).filter(pl.col("label") == "both_bad")["pair_id"].to_list()
    pairs = pl.scan_parquet(run.pairs_path).filter(pl.col("pair_id").is_in(named)).collect()
    test = run.dataset / "test.parquet"
    if test.exists():
        held = pl.read_parquet(test, columns=["prompt_id"])["prompt_id"].to_list()
        pairs = pairs.filter(~pl.col("prompt_id").is_in(held))
    return pairs.sort("pair_id").to_dicts()


def described(train: TrainConfig) -> str:
    return f"KTO, loss {(train.loss or ['kto'])[0]}, beta {train.beta:g}"
