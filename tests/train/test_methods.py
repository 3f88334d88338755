"""Each method once, on a real trainer of TRL, to a model that transformers loads and answers with."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, Literal

import polars as pl
import pytest

from rlaif.config.models import Config
from rlaif.errors import ConfigMismatchError, DatasetChangedError, MissingDependencyError, RunError, UsageError
from rlaif.records import Choice, Review, content_key
from rlaif.report import recommendation, report_data
from rlaif.run.run import Run
from rlaif.stats import wilson
from rlaif.train import methods, metrics, trl_config
from rlaif.train import trainer as loop
from rlaif.train.artifacts import TrainResult
from rlaif.train.methods import kto
from tests.train.pairs import rows
from tests.train.test_trainer import history

pytestmark = pytest.mark.real

Train = Callable[..., TrainResult]

SCORES_WITHIN = 1e-4
"""How far a score of the small model in float32, about 1, may differ with the batch: a hundred times its rounding."""


@pytest.fixture
def train(run: Run, small: Path) -> Train:
    def train(method: str, *, say: Callable[[str], None] = lambda _line: None, **changed: Any) -> TrainResult:
        train_settings = {"method": method, "model": str(small), "output": str(run.path / method), "batch_size": 4,
                  "max_length": 128, "max_steps": 2, "learning_rate": 1e-2, **changed}  # fmt: skip
        return loop.train(run, Config.model_validate({"train": train_settings}), log=say)

    return train


def answer(folder: Path | None) -> str:
    """What the model in ``folder`` says to a question, by transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Name a colour."}], add_generation_prompt=True,
                                        return_tensors="pt", return_dict=True)  # fmt: skip
    out = AutoModelForCausalLM.from_pretrained(folder).generate(**ids, max_new_tokens=4, min_new_tokens=4)
    return str(tokenizer.decode(out[0][ids["input_ids"].shape[1] :]))


def test_sft_makes_the_chosen_answers_likelier(train: Train) -> None:
    result = train("sft", max_steps=8)
    assert (result.pairs, result.steps) == (16, 8)
    assert [point["step"] for point in history(result)] == list(range(1, 9))
    assert history(result)[-1]["loss"] < history(result)[0]["loss"]
    assert "SFT on the chosen answers, loss nll" in (result.output / "README.md").read_text()
    assert answer(result.merged)
    assert train("sft", max_steps=8) == result


def test_a_reward_model_learns_and_is_read_by_transformers(train: Train) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    lines: list[str] = []
    result = train("reward", max_steps=12, say=lines.append)
    assert result.accuracy_after is not None
    assert result.accuracy_after.value == 1.0  # the held-out pairs are the training pairs under other numbers
    assert result.moved is None
    assert "has the higher score in 1.000" in lines[-1]
    card = (result.output / "README.md").read_text()
    assert "chosen answer scored higher, after" in card
    assert "pipeline_tag: text-classification\ntags: [trl, reward, rlaif]" in card
    assert result.merged is not None
    model = AutoModelForSequenceClassification.from_pretrained(result.merged, dtype=torch.float32)
    assert model.config.num_labels == 1
    tokenizer = AutoTokenizer.from_pretrained(result.merged)
    scores = []
    for text in ("An apple.", "I would rather not."):
        turns = [{"role": "user", "content": "Name a fruit. (3)"}, {"role": "assistant", "content": text}]
        ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            scores.append(model(**ids).logits.item())
    assert scores[0] > scores[1]
    # Padding does not change a score: servers send batches.
    with torch.no_grad():
        padded = torch.nn.functional.pad(ids["input_ids"], (0, 3), value=model.config.pad_token_id)
        assert model(input_ids=padded).logits.item() == pytest.approx(scores[1], abs=SCORES_WITHIN)


def test_what_is_too_long_for_a_reward_model_is_told_before_and_after(train: Train, run: Run, small: Path) -> None:
    """TRL leaves such a pair out whole, whichever side is too long."""
    long = [{"role": "assistant", "content": "word " * 200}]
    pl.DataFrame([{**row, "rejected": long} if index < 6 else row for index, row in enumerate(rows(16))]).write_parquet(
        run.dataset / "train.parquet"
    )
    train_settings = {"model": str(small), "method": "reward", "batch_size": 4, "max_length": 128}
    prepared, description = loop.plan(run, Config.model_validate({"train": train_settings}))
    (length,) = (finding.message for finding in prepared.findings if finding.name == "length")
    assert "6 of 16 pairs" in length
    assert "they are left out" in length
    assert description.startswith("3 steps of 4 pairs")
    assert "on about 10 pairs" in description
    result = train("reward", max_steps=None, merge=False)
    assert (result.pairs, result.steps) == (10, 3)
    card = (result.output / "README.md").read_text()
    assert "10 preference pairs (6 more were left out: they are longer than the longest sequence)." in card
    _, description = loop.plan(run, Config.model_validate({"train": {**train_settings, "method": "dpo"}}))
    assert "on 16 pairs" in description  # an answer's end is cut off


def test_pairs_are_measured_in_the_order_of_their_lengths_and_told_in_their_own(small: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(small, num_labels=1, pad_token_id=2, dtype=torch.float32)
    accelerator = SimpleNamespace(unwrap_model=lambda model: model, autocast=contextlib.nullcontext)

    lengths = (9, 3, 30, 4, 12)
    pairs = [
        metrics.TokenizedPair(list(range(5, 5 + length)), list(range(60, 60 + length // 2)), start=1)
        for length in lengths
    ]

    def measured(size: int, pairs: list[metrics.TokenizedPair]) -> list[tuple[float, float]]:
        trainer = SimpleNamespace(model=model, accelerator=accelerator, args=SimpleNamespace(
            per_device_eval_batch_size=size), processing_class=AutoTokenizer.from_pretrained(small))  # fmt: skip
        return [(each.chosen, each.rejected) for each in metrics.pair_logprobs(trainer, pairs, "score")]

    alone = [measured(1, [pair])[0] for pair in pairs]
    scores = sorted(score for pair_scores in alone for score in pair_scores)
    assert min(high - low for low, high in itertools.pairwise(scores)) > 2 * SCORES_WITHIN  # none stands in for another
    for size in (1, 2, 5):
        together = measured(size, pairs)
        assert [chosen for chosen, _ in together] == pytest.approx([chosen for chosen, _ in alone], abs=SCORES_WITHIN)
        assert [rejected for _, rejected in together] == pytest.approx([bad for _, bad in alone], abs=SCORES_WITHIN)


def call_both_bad(run: Run, prompts: list[str], but: Mapping[int, Choice] = MappingProxyType({})) -> None:
    """Pairs bad-0, bad-1, ... on ``prompts`` that somebody called both bad, or what ``but`` says."""
    pairs = [{"pair_id": f"bad-{n}", "prompt_id": prompt, "prompt": f'[{{"role":"user","content":"Sing {n}."}}]',
              "response_a": "No.", "response_b": "Never."} for n, prompt in enumerate(prompts)]  # fmt: skip
    run.pairs_path.parent.mkdir(exist_ok=True)
    pl.DataFrame(pairs).write_parquet(run.pairs_path)
    for index in range(len(prompts)):
        append_review(run, f"bad-{index}", "ann", but.get(index, "both_bad"))


def append_review(
    run: Run, pair: str, who: str, choice: Choice, role: Literal["annotator", "adjudicator"] = "annotator"
) -> None:
    preferred: Literal["a"] | None = "a" if choice == "left" else None
    with run.lock(), run.journal("reviews") as journal:
        journal.append(
            [
                Review(
                    key=content_key(pair=pair, who=who),
                    pair_id=pair,
                    prompt_id="p",
                    annotator=who,
                    role=role,
                    choice=choice,
                    left_side="a",
                    preferred=preferred,
                    route="audit",
                )
            ]
        )


def test_kto_takes_what_people_called_both_bad(train: Train, run: Run) -> None:
    first = train("kto", max_steps=1, merge=False)
    assert first.pairs == 32
    call_both_bad(run, ["other-0", "other-1", "prompt-16"], but={1: "tie"})
    # One is a tie, and one stands on a prompt of the test set.
    assert [pair["pair_id"] for pair in kto.both_bad_pairs(run)] == ["bad-0"]
    with pytest.raises(
        DatasetChangedError, match="since then people call other pairs both bad\n"
    ):  # not gone on with over other rows
        train("kto", max_steps=2, merge=False)
    result = train("kto", max_steps=2, output=str(run.path / "more"))
    assert result.pairs == 34
    assert answer(result.merged)
    assert "kl" in history(result)[-1]


def test_people_call_a_pair_both_bad_by_the_rule_of_the_dataset(run: Run) -> None:
    """The adjudicator over everybody, else the majority."""
    call_both_bad(run, [f"other-{n}" for n in range(5)], but={0: "left", 3: "left"})
    append_review(run, "bad-0", "lead", "both_bad", role="adjudicator")
    append_review(run, "bad-1", "lead", "left", role="adjudicator")
    append_review(run, "bad-2", "bob", "both_bad")
    append_review(run, "bad-2", "cy", "left")
    for who in ("bob", "cy"):
        append_review(run, "bad-3", who, "both_bad")
    append_review(run, "bad-4", "bob", "left")
    assert [pair["pair_id"] for pair in kto.both_bad_pairs(run)] == ["bad-0", "bad-2", "bad-3"]


def test_the_identity_of_other_methods_knows_nothing_of_both_bad_pairs(run: Run) -> None:
    train = Config.model_validate({"train": {"method": "dpo"}}).train
    frame = pl.DataFrame(rows(4))
    before = methods.get_method("dpo").build_dataset(frame, run, train, 0).extra_identity
    call_both_bad(run, ["other-0"])
    assert methods.get_method("dpo").build_dataset(frame, run, train, 0).extra_identity == before == {}


@pytest.mark.parametrize("size", [2, 4])
def test_kto_learns_its_kl_from_answers_to_other_prompts(
    train: Train, run: Run, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL's own batches: the answer that stands in for the KL term is never one to the same prompt."""
    trainers: list[Any] = []
    build_trainer = loop._build_trainer
    monkeypatch.setattr(loop, "_build_trainer", lambda *given: trainers.append(build_trainer(*given)) or trainers[-1])
    call_both_bad(run, [f"other-{n}" for n in range(6)])
    train("kto", max_steps=1, merge=False, per_device_batch_size=size, output=str(run.path / f"by-{size}"))
    (trainer,) = trainers
    examples = list(trainer.train_dataset)
    assert list(trainer._get_train_sampler()) == list(range(44))
    for first in range(0, 44, size):
        batch = examples[first : first + size]
        for before, row in zip([batch[-1], *batch], batch, strict=False):
            assert row["KL_completion_ids"] == before["completion_ids"]
            assert row["prompt_ids"] != before["prompt_ids"]
    both_bad = ["Sing" in trainer.processing_class.decode(row["prompt_ids"]) for row in examples]
    assert (sum(both_bad), sum(both_bad[:22])) == (12, 6)  # in no block of their own


def test_the_order_of_ktos_rows_is_the_seeds() -> None:
    examples = [{"prompt": f"p{n // 4}", "completion": f"a{n}", "label": n % 2 == 0} for n in range(400)]
    first, reversed_input, other = (
        kto.order_rows_for_kl(given, seed) for given, seed in ((examples, 1), (examples[::-1], 1), (examples, 2))
    )
    assert first == reversed_input != other
    assert sorted(row["completion"] for row in first) == sorted(row["completion"] for row in examples)
    positions: dict[str, list[int]] = {}
    for index, row in enumerate(first):
        positions.setdefault(row["prompt"], []).append(index)
    assert all(later - sooner == 100 for indices in positions.values() for sooner, later in itertools.pairwise(indices))


def test_what_stands_on_the_device_at_once_decides_what_kto_trains(
    train: Train, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    train("kto", max_steps=1, merge=False)
    with pytest.raises(ConfigMismatchError, match="per_device_batch_size was 2, now 4"):
        train("kto", max_steps=2, merge=False, per_device_batch_size=4)
    assert train("kto", max_steps=1, merge=False, per_device_batch_size=3).steps == 1  # of a batch of 4, still 2

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(metrics, "pair_logprobs", full)
    for method, way in (("kto", "Set a smaller max_length"), ("dpo", "Set per_device_batch_size = 1")):
        with pytest.raises(RunError, match="out of memory") as caught:
            train(method, max_steps=1, output=str(run.path / "full"))
        assert (caught.value.hint or "").startswith(way)
    with pytest.raises(UsageError, match="batch size must be > 1"):  # why KTO is not told what the others are
        train("kto", per_device_batch_size=1, output=str(run.path / "one"))


def test_rloo_against_the_reward_model_that_was_trained_here(train: Train, run: Run) -> None:
    with pytest.raises(UsageError, match="needs a reward model") as caught:
        train("rloo")
    assert "--method reward" in (caught.value.hint or "")
    reward = train("reward", max_steps=1)
    with pytest.raises(UsageError, match="holds no reward model") as caught:
        train("rloo", reward_model=str(reward.output))
    assert str(reward.merged) in (caught.value.hint or "")
    extra = {"max_completion_length": 8, "num_generations": 2}
    result = train("rloo", reward_model=str(reward.merged), max_steps=1, trl=extra)
    assert result.pairs == 16
    assert {"reward", "kl"} <= history(result)[-1].keys()
    assert "2 answers a prompt, KL beta 0.1" in (result.output / "README.md").read_text()
    assert answer(result.merged)


def test_reversed_labels_are_named(run: Run, train: Train) -> None:
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows(24)]
    pl.DataFrame(turned).write_parquet(run.dataset / "train.parquet")
    pl.DataFrame(rows(24, first=24)).write_parquet(run.dataset / "test.parquet")
    lines: list[str] = []
    result = train("dpo", max_steps=6, say=lines.append, merge=False)
    assert result.moved is not None
    assert result.reversed == result.moved
    assert any("are the labels reversed?" in line for line in lines)
    turned = report_data.load_training(run, {"train": {"config": {"train": {"output": str(result.output)}}}})
    assert recommendation.find_estimate(turned, "reversed") == dataclasses.asdict(
        result.moved
    )  # the report reads it there


@pytest.mark.parametrize(
    ("moved", "after", "named"),
    [
        (None, (3, 30), True),  # a reward model
        ((28, 30), (3, 30), False),  # the chosen answers are a stronger model's: less likely, and yet learned
        ((3, 30), (20, 30), True),
        ((8, 30), (20, 30), False),
        ((1, 10), (1, 10), False),  # too few to say so
        (None, None, False),
    ],
)
def test_when_labels_are_called_reversed(
    moved: tuple[int, int] | None, after: tuple[int, int] | None, named: bool
) -> None:
    estimates = {"moved": moved and wilson(*moved), "accuracy_after": after and wilson(*after)}
    result = TrainResult(Path(), None, None, pairs=9, steps=1, seconds=1.0, loss=None, **estimates)
    assert (result.reversed is not None) is named


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"method": "sft", "loss": ["nl"]}, "TRL has no loss 'nl'. Did you mean 'nll'?"),
        ({"method": "sft", "loss": ["nll", "dft"]}, "SFT takes one loss, not 2"),
        ({"method": "reward", "loss": ["sigmoid"]}, "Reward model has one loss only"),
        ({"method": "kto", "trl": {"desirable_wait": 2}}, "KTOConfig has no setting 'desirable_wait'. Did you mean"),
        ({"method": "rloo", "batch_size": 6}, "does not hold whole prompts of 4 answers"),
        ({"method": "kto", "trl": {"beta": 2}}, "Set beta under [train] instead."),
    ],
)
def test_what_a_method_does_not_have(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    train_config = Config.model_validate({"train": changed}).train
    with pytest.raises(UsageError) as caught:
        trl_config.trl_config_kwargs(train_config, seed=0, folder=tmp_path, pairs=10)
    assert message in str(caught.value)


def test_qlora_needs_cuda_and_an_adapter(train: Train) -> None:
    import torch

    with pytest.raises(UsageError, match="only an adapter"):
        train("dpo", qlora=True, lora=False)
    if torch.cuda.is_available():
        pytest.skip("there is CUDA here")
    with pytest.raises(MissingDependencyError, match="needs CUDA"):
        train("dpo", qlora=True)
