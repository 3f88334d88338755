"""The trained model and its reference: find both, and check that there is something to evaluate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import orjson

from rlaif.config.models import Config
from rlaif.errors import UsageError
from rlaif.evaluate.evaluation_result import EvaluationResult, read_evaluation
from rlaif.llm.backends import LocalModel
from rlaif.run.journal import iter_records
from rlaif.run.run import Run
from rlaif.run.training_output import trained_model_name, training_output

EVALUATION_FILE = "evaluation.json"
EVALUATION_DIR = "evaluation"
"""Directory of the evaluation inside the run. It is a run directory of its own."""
VLLM_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM allows as maximum rank of adapters."""


@dataclass(frozen=True)
class EvaluatedModels:
    """The two models to compare. ``trained`` is a name that changes with each training; ``local`` has its path."""

    reference: str
    trained: str
    local: LocalModel


@dataclass(frozen=True)
class FinishedTraining:
    """The last training of a run, from OUTPUT/training.json."""

    output: Path
    name: str
    """Name of the trained model, which changes with each training."""
    base_model: str
    is_reward_model: bool
    adapter: Path | None
    merged: Path | None


def load_training(run: Run, config: Config) -> FinishedTraining:
    """Read the result of the last training. Raises :class:`UsageError` if it is missing."""
    output = training_output(run, config)
    try:
        stored = orjson.loads((output / "training.json").read_bytes())
        identity, result = stored["identity"], stored["result"]
        return FinishedTraining(
            output=output,
            name=trained_model_name(output, {"identity": identity, "result": result}),
            base_model=identity["model"].strip(),
            is_reward_model=identity.get("method") == "reward",
            adapter=Path(result["adapter"]) if result.get("adapter") else None,
            merged=Path(result["merged"]) if result.get("merged") else None,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(
            "no trained model was found", location=str(output), hint=f"Train first: `rlaif train {run.path}`."
        ) from None


def evaluated_models(run: Run, config: Config) -> EvaluatedModels:
    """Find both models. Raises :class:`UsageError` if no model that can answer was trained."""
    training = load_training(run, config)
    location, reference, name = str(training.output), training.base_model, training.name
    if training.is_reward_model:
        raise UsageError("this is a reward model, which does not generate answers", location=location,
                         hint="Train with another `--method`; to test this one, use `rlaif judges exam`.")  # fmt: skip
    if training.adapter:
        rank = _lora_rank(training.adapter)
        return EvaluatedModels(reference, name, LocalModel(name, str(training.adapter), base=reference, rank=rank))
    if training.merged:
        return EvaluatedModels(reference, name, LocalModel(name, str(training.merged)))
    raise UsageError(
        "the training left neither an adapter nor a model", location=location, hint="Train with another `--method`."
    )


def _lora_rank(adapter: Path) -> int:
    """Return the smallest rank that vLLM allows and that is enough for this adapter."""
    config_path = adapter / "adapter_config.json"
    try:
        rank = int(orjson.loads(config_path.read_bytes())["r"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError("the adapter's rank is missing", location=str(config_path), hint="Train again.") from None
    return next((supported for supported in VLLM_LORA_RANKS if supported >= rank), VLLM_LORA_RANKS[-1])


def require_evaluable(run: Run, config: Config, *, will_train: bool) -> str:
    """Return the reference model of an evaluation at the end of a run. ``will_train``: the run trains first.

    Raises :class:`UsageError` if it is already known that nothing could be evaluated.
    """
    if will_train and config.train.method == "reward":
        raise UsageError("a reward model generates no answers, so it cannot be evaluated", location="train.method",
                         hint="Train with another `--method`, or omit `--evaluate`.")  # fmt: skip
    candidates = [config.train.model, *(policy.model for policy in config.policies), *config.sampler.model, "its base"]
    reference = next(filter(None, candidates)) if will_train else evaluated_models(run, config).reference
    prompts = run.journal_path("prompts")
    held_out = config.prompts.heldout_fraction > 0
    if prompts.exists():
        held_out = any(record["split"] == "heldout" for _, record in iter_records(prompts))
    if not config.evaluate.sources and not held_out:
        raise nothing_held_out_error(run)
    return reference


def existing_evaluation(run: Run, config: Config) -> EvaluationResult | None:
    """Return the last evaluation if it is complete and of this training and these settings, else None."""
    stage, models = run.manifest()["stages"].get("evaluate", {}), evaluated_models(run, config)
    evaluation = read_evaluation(run.path / EVALUATION_DIR / EVALUATION_FILE)
    if evaluation is None or evaluation.trained != models.trained:
        return None
    same_settings = stage.get("config", {}).get("evaluate") == config.evaluate.model_dump(mode="json")
    complete = stage.get("ended") and not evaluation.stopped and not stage["history"][-1].get("failures")
    return evaluation if same_settings and complete else None


def nothing_held_out_error(run: Run) -> UsageError:
    """Return the error for a run without held-out prompts."""
    return UsageError(
        "no prompt was held out",
        location=str(run.path),
        hint="Pass prompts that are not trained on: `--prompts SRC`. In the next run, keep heldout_fraction above 0.",
    )
