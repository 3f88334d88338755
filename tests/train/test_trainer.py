"""Real trainings with TRL: one of the demo model, the others of a similar model that is a hundred times smaller.

The small model has the demo model's tokenizer.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from rlaif.config.models import Config
from rlaif.errors import ConfigMismatchError, DatasetChangedError, MissingDependencyError, RunError, UsageError
from rlaif.run.run import Run
from rlaif.serving.demo_model import demo_checkpoint
from rlaif.train import artifacts, checkpoints, metrics, trainer, trl_config
from rlaif.train.artifacts import TrainResult
from rlaif.train.methods.base import loss_names
from tests.train.pairs import rows

pytestmark = pytest.mark.real


@pytest.fixture
def train(run: Run, small: Path) -> Callable[..., TrainResult]:
    def train(*, log: Callable[[str], None] = lambda _line: None, seed: int = 0, **changed: Any) -> TrainResult:
        defaults = {"batch_size": 4, "max_length": 128, "max_steps": 2, "learning_rate": 1e-2}
        train_settings = {"model": str(small), **defaults, **changed}
        return trainer.train(run, Config.model_validate({"seed": seed, "train": train_settings}), log=log)

    return train


WEIGHTS_WITHIN = 1e-3
"""Maximum distance (:func:`apart`) of two float32 trainings that sum the same numbers in a different order.

Sums in float32 differ by 1e-7. Adam divides a gradient by its size, so a weight whose gradient is only rounding error
can move by a full step. We measured 5e-6 between one and two processes. Other rows, another order or a lost optimizer
state change all weights.
"""
LOSS_WITHIN = 1e-4
"""The same for losses: rewards are differences of log-probabilities near -100, which float32 rounds to 1e-5."""


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    (file,) = folder.glob("*.safetensors")
    return dict(load_file(file))


def history(result: TrainResult) -> list[dict[str, float]]:
    points: list[dict[str, float]] = json.loads((result.output / "training.json").read_text())["history"]
    return points


def differ(left: dict[str, Any], right: dict[str, Any]) -> bool:
    assert left.keys() == right.keys()
    return any(not left[name].equal(right[name]) for name in left)


def apart(left: dict[str, Any], right: dict[str, Any]) -> float:
    """Return the distance of two adapters, relative to the change by the training (``lora_B`` starts at zero)."""
    assert left.keys() == right.keys()
    changed = sum(float(left[name].square().sum()) for name in left if "lora_B" in name)
    assert changed > 0
    return float(sum(float((left[name] - right[name]).square().sum()) for name in left) / changed) ** 0.5


def test_lora_of_the_demo_model(run: Run) -> None:
    """A dataset and a policy's name are enough to train an adapter and a complete model that can be loaded."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lines: list[str] = []
    config = Config.model_validate(
        {
            "sampler": {"model": "demo"},
            "train": {"max_steps": 2, "batch_size": 4, "max_length": 128, "learning_rate": 1e-3, "save_steps": 2},
        }
    )
    result = trainer.train(run, config, log=lines.append)

    assert (result.pairs, result.steps, result.n, result.resumed_from) == (16, 2, 4, None)
    assert result.seconds > 0
    assert result.loss is not None
    assert result.accuracy_before is not None
    assert result.accuracy_after is not None
    assert result.moved is not None
    assert result.moved.value == 1.0  # the held-out pairs are the training pairs with other numbers
    assert set(result.paths()) == {"adapter", "merged", "card"}
    text = "\n".join(lines)
    assert "<|im_start|>user\nName a colour. (0)<|im_end|>" in text
    assert re.search(
        r"step 2/2, loss 0\.\d+, reward margin \S+, reward accuracy \S+, KL estimate \S+, \S+ pairs/s", text
    )

    base_path = demo_checkpoint()
    base = AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(result.merged, dtype=torch.float32)
    assert differ(base.state_dict(), merged.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(result.merged)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(base_path).chat_template
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(result.adapter).chat_template
    ids = tokenizer("Name a colour.", return_tensors="pt").input_ids
    with torch.no_grad():
        plain = base(ids).logits
        full_logits = merged(ids).logits
        adapted = PeftModel.from_pretrained(base, str(result.adapter))(ids).logits
    assert (full_logits - plain).abs().max() > 0.1
    # The merged weights are rounded to the base's bfloat16, so they agree up to that.
    assert (full_logits - adapted).abs().mean() < 0.2 * (full_logits - plain).abs().mean()
    assert not list(run.model.rglob("*.bin.index.json"))
    assert [path.name for path in run.model.iterdir() if path.name.startswith(".")] == []

    card = (run.model / "README.md").read_text(encoding="utf-8")
    assert "Trained from `demo`" in card
    assert "Labeled by: judge 12, human 4." in card
    assert str(result.accuracy_after) in card

    repeated = trainer.train(run, config, log=lines.append)
    assert repeated == result
    assert "already trained" in lines[-1]


def test_a_larger_max_steps_resumes_and_a_smaller_one_is_rejected(train: Callable[..., TrainResult]) -> None:
    first = train(max_steps=1, save_steps=1)
    assert first.adapter is not None
    before = weights(first.adapter)
    # The number of pairs on the device may change, because that is the fix after running out of memory.
    grown = train(max_steps=3, save_steps=1, per_device_batch_size=1)
    assert (grown.resumed_from, grown.steps) == (1, 3)
    assert grown.adapter is not None
    assert differ(before, weights(grown.adapter))
    with pytest.raises(ConfigMismatchError, match="max_steps may only grow: it was 3, now 2"):
        train(max_steps=2)


def test_a_training_killed_after_its_last_step_is_finished_by_a_rerun(
    train: Callable[..., TrainResult], run: Run
) -> None:
    first = train(merge=False)
    assert first.adapter is not None
    assert first.merged is None
    before = weights(first.adapter)
    (run.model / "training.json").unlink()
    finished = train(merge=True)
    assert (finished.resumed_from, finished.steps, finished.loss) == (2, 2, first.loss)
    assert finished.moved == first.moved
    assert finished.adapter is not None
    assert finished.merged is not None
    assert not differ(before, weights(finished.adapter))


def test_full_training_keeps_the_precision_of_the_base(train: Callable[..., TrainResult], small: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    result = train(lora=False, max_steps=1)
    assert result.adapter is None
    assert result.merged is not None
    assert set(result.paths()) == {"merged", "card"}
    model = AutoModelForCausalLM.from_pretrained(result.merged)
    assert model.dtype == torch.bfloat16
    assert differ(model.state_dict(), AutoModelForCausalLM.from_pretrained(small).state_dict())
    assert "| Weights | all |" in (result.output / "README.md").read_text(encoding="utf-8")
    assert train(lora=False, max_steps=1) == result
    # Resuming after the first step, with all weights and the frozen reference.
    assert train(lora=False, max_steps=2).resumed_from == 1


def test_logits_at_answers_only_do_not_change_the_weights(
    train: Callable[..., TrainResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import contextlib

    quick = train(output=str(tmp_path / "quick"), dtype="float32", merge=False)
    monkeypatch.setattr(metrics, "patch_answer_only_logits", contextlib.nullcontext)
    plain = train(output=str(tmp_path / "plain"), dtype="float32", merge=False)
    assert quick.adapter is not None
    assert plain.adapter is not None
    assert apart(weights(quick.adapter), weights(plain.adapter)) < WEIGHTS_WITHIN


def test_trls_losses_can_be_combined(train: Callable[..., TrainResult]) -> None:
    assert {"sigmoid", "robust", "ipo", "sft"} <= set(loss_names())
    extra = {"label_smoothing": 0.1, "loss_weights": [1.0, 0.2], "warmup_steps": 1}
    result = train(loss=["robust", "sft"], dtype="bfloat16", trl=extra)
    card = (result.output / "README.md").read_text(encoding="utf-8")
    assert "loss robust + sft" in card
    assert "| label_smoothing | 0.1 |" in card


def test_prompts_with_tools_and_tool_calls_can_be_trained_on(train: Callable[..., TrainResult], run: Run) -> None:
    call = [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}]
    turns = [
        {"role": "user", "content": "Weather?", "tool_calls": None},
        {"role": "assistant", "content": "", "tool_calls": call},
        {"role": "tool", "content": "Rain", "tool_calls": None},
    ]
    tools = '[{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]'
    examples = [
        {**row, "prompt": turns if index % 2 else row["prompt"], "tools": tools if index % 2 else None}
        for index, row in enumerate(rows(8))
    ]
    pl.DataFrame(examples).write_parquet(run.dataset / "train.parquet")
    assert train(max_steps=1).pairs == 8


def test_nothing_is_measured_without_held_out_pairs(train: Callable[..., TrainResult], run: Run) -> None:
    (run.dataset / "test.parquet").unlink()
    result = train(max_steps=1)
    assert (result.n, result.accuracy_before, result.accuracy_after, result.moved) == (0, None, None, None)
    assert "Not measured" in (result.output / "README.md").read_text(encoding="utf-8")


def test_the_error_names_changed_settings_and_rows(train: Callable[..., TrainResult], run: Run) -> None:
    train(max_steps=1, save_steps=1)
    with pytest.raises(ConfigMismatchError, match=r"beta was 0\.1, now 0\.3") as caught:
        train(max_steps=1, beta=0.3)
    assert caught.value.location == str(run.model / "checkpoints")
    assert "--output" in (caught.value.hint or "")
    with pytest.raises(ConfigMismatchError, match="seed was 0, now 1"):
        train(max_steps=1, seed=1)
    pl.DataFrame(rows(15)).write_parquet(run.dataset / "train.parquet")
    with pytest.raises(
        DatasetChangedError, match="since this training was finished, its rows changed: the dataset has other rows"
    ) as raised:
        train(max_steps=1)
    assert "overwrite = true" in (raised.value.hint or "")  # the setting that rlaif run also has
    with pytest.raises(ConfigMismatchError, match=r"beta was 0\.1, now 0\.3; the dataset") as caught:
        train(max_steps=1, beta=0.3)
    assert not isinstance(caught.value, DatasetChangedError)
    facts = (run.model / "training.json").rename(run.path / "facts")
    with pytest.raises(DatasetChangedError, match="interrupted, its rows changed: the dataset has other rows"):
        train(max_steps=1)
    facts.rename(run.model / "training.json")
    retrained = train(max_steps=1, overwrite=True)
    assert (retrained.pairs, retrained.steps, retrained.resumed_from) == (15, 1, None)
    assert train(max_steps=1).pairs == 15  # the output belongs to the new training


def test_a_loss_that_is_not_finite_stops_the_training(train: Callable[..., TrainResult], run: Run) -> None:
    with pytest.raises(RunError, match=r"the loss is (nan|inf)") as caught:
        train(lora=False, learning_rate=1e30, max_steps=3, save_steps=1)
    assert "learning_rate" in (caught.value.hint or "")
    assert not (run.model / "merged").exists()
    newest, _ = checkpoints.latest_complete(run.model / "checkpoints")
    assert newest is not None
    assert newest.name == "checkpoint-1"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"loss": ["sigmiod"]}, "Did you mean 'sigmoid'?"),
        ({"trl": {"warmup_step": 3}}, "Did you mean 'warmup_steps'?"),
        ({"trl": {"zzz": 3}}, "See TRL's documentation"),
        ({"trl": {"learning_rate": 3}}, "Set learning_rate under [train] instead."),
        ({"trl": {"gradient_accumulation_steps": 3}}, "Set batch_size under [train] instead."),
        ({"trl": {"trust_remote_code": True}}, "trust_remote_code cannot be set"),
        ({"trl": {"hub_token": "secret"}}, "secrets are read from the environment only"),
        ({"trl": {"label_smoothing": 0.1}}, "label_smoothing has no effect with the loss sigmoid"),
        ({"trl": {"lr_scheduler_type": "sideways"}}, "TRL rejects these settings"),
        ({"trl": {"report_to": "tensorbord"}}, "Did you mean 'tensorboard'?"),
        ({"loss": ["exo_pair"]}, "TRL rejects these settings: Label smoothing must be greater"),
        ({"model": "/nowhere/model"}, "the model '/nowhere/model' cannot be loaded"),
    ],
)
def test_invalid_settings_are_rejected_before_training(
    train: Callable[..., TrainResult], changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        train(**changed)
    assert message in str(caught.value)


def test_report_to_sends_the_training_curves(
    train: Callable[..., TrainResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from transformers.integrations import integration_utils

    result = train(trl={"report_to": ["tensorboard"]})
    (folder,) = (result.output / "checkpoints" / "runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    for ours, theirs in (("loss", "train/loss"), ("margin", "train/rewards/margins")):
        sent = {event.step: event.value for event in events.Scalars(theirs)}
        assert sent == pytest.approx({point["step"]: point[ours] for point in history(result)})
        assert sent.keys() == {1, 2}

    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", list)
    with pytest.raises(MissingDependencyError, match="report_to needs wandb"):
        train(trl={"report_to": "wandb"}, output="elsewhere")


def test_a_dry_run_shows_the_preflight_and_writes_nothing(
    train: Callable[..., TrainResult], run: Run, small: Path, rlaif: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """The model to train is the policy that answered, even if rlaif.toml names another one since."""
    (run.path / "rlaif.toml").write_text('[sampler]\nmodel = ["another"]\n')
    policy_config = Config.model_validate(
        {"judge": {"panel": ["helpful"], "model": "m"}, "sampler": {"model": [str(small)]}}
    )
    for stage in ("generate", "judge"):
        run.update_manifest(stage, config=policy_config.model_dump(mode="json"))
    before = sorted(run.path.rglob("*"))
    stdout = rlaif("train", run.path, "--method", "kto", "--dry-run").stdout
    assert sorted(run.path.rglob("*")) == before
    for part in (
        "warn  only 16 pairs: fewer than 100",
        "pass  train: 0 of 16 pairs have the same chosen and rejected",
        "<|im_start|>user\nName a colour. (0)",
        f"4 steps of 8 answers: KTO, LoRA of {small} on",
    ):
        assert part in stdout
    assert "Nothing was trained" in stdout
    assert "verl" in rlaif("train", run.path, "--method", "ppo", "--dry-run", code=2).stderr
    result = train(max_steps=1, merge=False)
    preflight = json.loads((result.output / "training.json").read_text())["preflight"]
    assert all(
        f"{finding['level']}  {finding['message']}" in stdout for finding in preflight if finding["name"] != "length"
    )


def test_an_adapter_is_rejected_as_the_model_to_train(train: Callable[..., TrainResult], run: Run) -> None:
    result = train(max_steps=1)
    for folder in (result.output, result.adapter):
        with pytest.raises(UsageError, match="the folder contains") as caught:
            train(model=str(folder), output="elsewhere")
    assert "an adapter" in caught.value.message
    # The merged model of one iteration is the base of the next one.
    assert train(model=str(result.merged), max_steps=1, output=str(run.path / "next")).steps == 1


def test_the_model_defaults_to_the_only_policy(run: Run) -> None:
    two = Config.model_validate({"sampler": {"model": ["m/one", "m/two"]}})
    with pytest.raises(UsageError, match="2 policies") as caught:
        trainer.train(run, two, log=print)
    assert "--model" in (caught.value.hint or "")
    with pytest.raises(UsageError, match="--model"):
        trainer.train(run, Config(), log=print)


def test_an_empty_dataset_is_rejected(train: Callable[..., TrainResult], run: Run) -> None:
    pl.DataFrame(rows(1)).clear().write_parquet(run.dataset / "train.parquet")
    with pytest.raises(UsageError, match="no rows"):
        train()
    assert not run.model.exists()


def test_an_output_that_cannot_be_written_is_an_error(train: Callable[..., TrainResult], run: Run) -> None:
    with pytest.raises(RunError, match="cannot be written: Not a directory"):
        train(output=str(run.dataset / "train.parquet" / "model"))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (Exception("Error while serializing: I/O error: No space left on device (os error 28)"), "No space left"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file"), "a part"),
        (ConnectionError("the hub is away"), None),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
    ],
)
def test_disk_errors_are_distinguished_from_bugs(error: Exception, reason: str | None) -> None:
    message = artifacts.disk_error(error)
    assert (message is None) if reason is None else (reason in (message or ""))


@pytest.mark.parametrize(
    ("batch", "most", "expected"), [(8, 2, (2, 4)), (8, 16, (8, 1)), (7, 2, (1, 7)), (6, 4, (3, 2)), (1, 2, (1, 1))]
)
def test_the_effective_batch_size_is_exact(batch: int, most: int, expected: tuple[int, int]) -> None:
    train = Config.model_validate({"train": {"batch_size": batch, "per_device_batch_size": most}}).train
    assert trl_config.batch_sizes(train) == expected
