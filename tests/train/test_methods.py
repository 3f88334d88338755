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

from rlaif.config import Config
from rlaif.errors import IdentityError, MissingPart, OtherRows, RunError, UsageError
from rlaif.records import Choice, Review, key_of
from rlaif.report import gather, verdict
from rlaif.run.directory import Run
from rlaif.stats import wilson
from rlaif.train import kto, loop, measure, methods, settings
from rlaif.train.writing import TrainResult
from tests.train.pairs import rows
from tests.train.test_dpo import history

pytestmark = pytest.mark.real

Train = Callable[..., TrainResult]

SCORES_WITHIN = 1e-4
"""How far a score of the small model in float32, about 1, may differ with the batch: a hundred times its rounding."""


@pytest.fixture
def train(run: Run, small: Path) -> Train:
    def train(method: str, *, say: Callable[[str], None] = lambda _line: None, **changed: Any) -> TrainResult:
        wanted = {"method": method, "model": str(small), "output": str(run.path / method), "batch_size": 4,
                  "max_length": 128, "max_steps": 2, "learning_rate": 1e-2, **changed}  # fmt: skip
        return loop.train(run, Config.model_validate({"train": wanted}), say=say)

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
    pl.DataFrame([{**row, "rejected": long} if place < 6 else row for place, row in enumerate(rows(16))]).write_parquet(
        run.dataset / "train.parquet"
    )
    wanted = {"model": str(small), "method": "reward", "batch_size": 4, "max_length": 128}
    prepared, how = loop.plan(run, Config.model_validate({"train": wanted}))
    (length,) = (finding.message for finding in prepared.findings if finding.name == "length")
    assert "6 of 16 pairs" in length
    assert "they are left out" in length
    assert how.startswith("3 steps of 4 pairs")
    assert "on about 10 pairs" in how
    result = train("reward", max_steps=None, merge=False)
    assert (result.pairs, result.steps) == (10, 3)
    card = (result.output / "README.md").read_text()
    assert "10 preference pairs (6 more were left out: they are longer than the longest sequence)." in card
    _, how = loop.plan(run, Config.model_validate({"train": {**wanted, "method": "dpo"}}))
    assert "on 16 pairs" in how  # an answer's end is cut off


def test_pairs_are_measured_in_the_order_of_their_lengths_and_told_in_their_own(small: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(small, num_labels=1, pad_token_id=2, dtype=torch.float32)
    accelerator = SimpleNamespace(unwrap_model=lambda model: model, autocast=contextlib.nullcontext)

    lengths = (9, 3, 30, 4, 12)
    pairs = [
        measure.Tokens(list(range(5, 5 + length)), list(range(60, 60 + length // 2)), start=1) for length in lengths
    ]

    def measured(size: int, pairs: list[measure.Tokens]) -> list[tuple[float, float]]:
        trainer = SimpleNamespace(model=model, accelerator=accelerator, args=SimpleNamespace(
            per_device_eval_batch_size=size), processing_class=AutoTokenizer.from_pretrained(small))  # fmt: skip
        return [(each.chosen, each.rejected) for each in measure.likelihoods(trainer, pairs, "score")]

    alone = [measured(1, [pair])[0] for pair in pairs]
    scores = sorted(score for both in alone for score in both)
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
    for place in range(len(prompts)):
        label(run, f"bad-{place}", "ann", but.get(place, "both_bad"))


def label(
    run: Run, pair: str, who: str, choice: Choice, role: Literal["annotator", "adjudicator"] = "annotator"
) -> None:
    preferred: Literal["a"] | None = "a" if choice == "left" else None
    with run.writing(), run.journal("reviews") as journal:
        journal.append([Review(key=key_of(pair=pair, who=who), pair_id=pair, prompt_id="p", annotator=who, role=role,
                               choice=choice, left="a", preferred=preferred, route="audit")])  # fmt: skip


def test_kto_takes_what_people_called_both_bad(train: Train, run: Run) -> None:
    first = train("kto", max_steps=1, merge=False)
    assert first.pairs == 32
    call_both_bad(run, ["other-0", "other-1", "prompt-16"], but={1: "tie"})
    # One is a tie, and one stands on a prompt of the test set.
    assert [pair["pair_id"] for pair in kto.both_bad(run)] == ["bad-0"]
    with pytest.raises(
        OtherRows, match="since then people call other pairs both bad\n"
    ):  # not gone on with over other rows
        train("kto", max_steps=2, merge=False)
    result = train("kto", max_steps=2, output=str(run.path / "more"))
    assert result.pairs == 34
    assert answer(result.merged)
    assert "kl" in history(result)[-1]


def test_people_call_a_pair_both_bad_by_the_rule_of_the_dataset(run: Run) -> None:
    """The adjudicator over everybody, else the majority."""
    call_both_bad(run, [f"other-{n}" for n in range(5)], but={0: "left", 3: "left"})
    label(run, "bad-0", "lead", "both_bad", role="adjudicator")
    label(run, "bad-1", "lead", "left", role="adjudicator")
    label(run, "bad-2", "bob", "both_bad")
    label(run, "bad-2", "cy", "left")
    for who in ("bob", "cy"):
        label(run, "bad-3", who, "both_bad")
    label(run, "bad-4", "bob", "left")
    assert [pair["pair_id"] for pair in kto.both_bad(run)] == ["bad-0", "bad-2", "bad-3"]


def test_the_identity_of_other_methods_knows_nothing_of_both_bad_pairs(run: Run) -> None:
    train = Config.model_validate({"train": {"method": "dpo"}}).train
    frame = pl.DataFrame(rows(4))
    before = methods.of("dpo").rows(frame, run, train, 0).deciding
    call_both_bad(run, ["other-0"])
    assert methods.of("dpo").rows(frame, run, train, 0).deciding == before == {}


@pytest.mark.parametrize("size", [2, 4])
def test_kto_learns_its_kl_from_answers_to_other_prompts(
    train: Train, run: Run, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL's own batches: the answer that stands in for the KL term is never one to the same prompt."""
    trainers: list[Any] = []
    ours = loop._trainer
    monkeypatch.setattr(loop, "_trainer", lambda *given: trainers.append(ours(*given)) or trainers[-1])
    call_both_bad(run, [f"other-{n}" for n in range(6)])
    train("kto", max_steps=1, merge=False, per_device_batch_size=size, output=str(run.path / f"by-{size}"))
    (trainer,) = trainers
    seen = list(trainer.train_dataset)
    assert list(trainer._get_train_sampler()) == list(range(44))
    for first in range(0, 44, size):
        batch = seen[first : first + size]
        for before, row in zip([batch[-1], *batch], batch, strict=False):
            assert row["KL_completion_ids"] == before["completion_ids"]
            assert row["prompt_ids"] != before["prompt_ids"]
    both_bad = ["Sing" in trainer.processing_class.decode(row["prompt_ids"]) for row in seen]
    assert (sum(both_bad), sum(both_bad[:22])) == (12, 6)  # in no block of their own


def test_the_order_of_ktos_rows_is_the_seeds() -> None:
    made = [{"prompt": f"p{n // 4}", "completion": f"a{n}", "label": n % 2 == 0} for n in range(400)]
    first, again, other = (kto.spread(given, seed) for given, seed in ((made, 1), (made[::-1], 1), (made, 2)))
    assert first == again != other
    assert sorted(row["completion"] for row in first) == sorted(row["completion"] for row in made)
    where: dict[str, list[int]] = {}
    for place, row in enumerate(first):
        where.setdefault(row["prompt"], []).append(place)
    assert all(later - sooner == 100 for own in where.values() for sooner, later in itertools.pairwise(own))


def test_what_stands_on_the_device_at_once_decides_what_kto_trains(
    train: Train, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    train("kto", max_steps=1, merge=False)
    with pytest.raises(IdentityError, match="per_device_batch_size was 2, now 4"):
        train("kto", max_steps=2, merge=False, per_device_batch_size=4)
    assert train("kto", max_steps=1, merge=False, per_device_batch_size=3).steps == 1  # of a batch of 4, still 2

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(measure, "likelihoods", full)
    for method, way in (("kto", "Set a smaller max_length"), ("dpo", "Set per_device_batch_size = 1")):
        with pytest.raises(RunError, match="out of memory") as caught:
            train(method, max_steps=1, output=str(run.path / "full"))
        assert (caught.value.mend or "").startswith(way)
    with pytest.raises(UsageError, match="batch size must be > 1"):  # why KTO is not told what the others are
        train("kto", per_device_batch_size=1, output=str(run.path / "one"))


def test_rloo_against_the_reward_model_that_was_trained_here(train: Train, run: Run) -> None:
    with pytest.raises(UsageError, match="needs a reward model") as caught:
        train("rloo")
    assert "--method reward" in (caught.value.mend or "")
    reward = train("reward", max_steps=1)
    with pytest.raises(UsageError, match="holds no reward model") as caught:
        train("rloo", reward_model=str(reward.output))
    assert str(reward.merged) in (caught.value.mend or "")
    extra = {"max_completion_length": 8, "num_generations": 2}
    result = train("rloo", reward_model=str(reward.merged), max_steps=1, extra=extra)
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
    turned = gather.training(run, {"train": {"config": {"train": {"output": str(result.output)}}}})
    assert verdict.estimate(turned, "reversed") == dataclasses.asdict(result.moved)  # the report reads it there


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
    found = {"moved": moved and wilson(*moved), "accuracy_after": after and wilson(*after)}
    result = TrainResult(Path(), None, None, pairs=9, steps=1, seconds=1.0, loss=None, **found)
    assert (result.reversed is not None) is named


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"method": "sft", "loss": ["nl"]}, "TRL has no loss 'nl'. Did you mean 'nll'?"),
        ({"method": "sft", "loss": ["nll", "dft"]}, "SFT takes one loss, not 2"),
        ({"method": "reward", "loss": ["sigmoid"]}, "Reward model has one loss only"),
        ({"method": "kto", "extra": {"desirable_wait": 2}}, "KTOConfig has no setting 'desirable_wait'. Did you mean"),
        ({"method": "rloo", "batch_size": 6}, "does not hold whole prompts of 4 answers"),
        ({"method": "kto", "extra": {"beta": 2}}, "Set beta under [train] instead."),
    ],
)
def test_what_a_method_does_not_have(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    wanted = Config.model_validate({"train": changed}).train
    with pytest.raises(UsageError) as caught:
        settings.arguments(wanted, seed=0, folder=tmp_path, pairs=10)
    assert message in str(caught.value)


def test_qlora_needs_cuda_and_an_adapter(train: Train) -> None:
    import torch

    with pytest.raises(UsageError, match="only an adapter"):
        train("dpo", quantize=True, lora=False)
    if torch.cuda.is_available():
        pytest.skip("there is CUDA here")
    with pytest.raises(MissingPart, match="needs CUDA"):
        train("dpo", quantize=True)
