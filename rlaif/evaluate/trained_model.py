"""What a training left, and what it is compared with: whether there is anything to evaluate, or nothing left to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from rlaif.config.models import Config
from rlaif.config.resume import trained_model_name
from rlaif.errors import UsageError
from rlaif.llm.backends import LocalModel
from rlaif.run.journal import iter_records
from rlaif.run.run import Run

EVALUATION_DIR = "evaluation"
"""Of the run that an evaluation is, in the run's own."""
VLLM_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The adapter ranks that vLLM has room for."""


@dataclass(frozen=True)
class EvaluatedModels:
    """The two that are compared. ``trained`` is a name that changes with the training; ``local`` is where it lies."""

    reference: str
    trained: str
    local: LocalModel


def load_training(run: Run, config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """The identity and the result of the last training. Raises :class:`UsageError` where there is none."""
    output = Path(config.train.output) if config.train.output else run.model
    try:
        stored = orjson.loads((output / "training.json").read_bytes())
        identity, result = dict(stored["identity"]), dict(stored["result"])
        identity["model"].strip()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(
            "no trained model is there", location=str(output), hint=f"Train first: rlaif train {run.path}"
        ) from None
    return identity, result


def evaluated_models(run: Run, config: Config) -> EvaluatedModels:
    """The two to compare. Raises :class:`UsageError` where nothing was trained that answers."""
    identity, result = load_training(run, config)
    output, reference = Path(config.train.output) if config.train.output else run.model, str(identity["model"])
    if identity.get("method") == "reward":
        raise UsageError("a reward model was trained, which does not answer", location=str(output),
                         hint="Examine it as a judge, or train with another --method.")  # fmt: skip
    name = trained_model_name(output, {"identity": identity, "result": result})
    if adapter := result.get("adapter"):
        return EvaluatedModels(
            reference, name, LocalModel(name, str(adapter), base=reference, rank=_lora_rank(Path(str(adapter))))
        )
    if merged := result.get("merged"):
        return EvaluatedModels(reference, name, LocalModel(name, str(merged)))
    raise UsageError(
        "the training left no model that answers", location=str(output), hint="Train with another --method."
    )


def _lora_rank(adapter: Path) -> int:
    """The least that vLLM has room for and that holds this adapter's."""
    config_path = adapter / "adapter_config.json"
    try:
        rank = int(orjson.loads(config_path.read_bytes())["r"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError("the adapter's rank is not there", location=str(config_path), hint="Train again.") from None
    return next((supported for supported in VLLM_LORA_RANKS if supported >= rank), VLLM_LORA_RANKS[-1])


def require_evaluable(run: Run, config: Config, *, will_train: bool) -> str:
    """The model that will be the reference of an evaluation at the end of a night. ``will_train``: a training goes
    before.

    Raises :class:`UsageError` where it is known now that nothing can be evaluated then."""
    if will_train and config.train.method == "reward":
        raise UsageError("a reward model does not answer, so it cannot be evaluated", location="train.method",
                         hint="Leave --evaluate away, or train with another --method.")  # fmt: skip
    candidates = [config.train.model, *(policy.model for policy in config.policies), *config.sampler.model, "its base"]
    reference = next(filter(None, candidates)) if will_train else evaluated_models(run, config).reference
    prompts = run.journal_path("prompts")
    held_out = config.prompts.heldout_fraction > 0
    if prompts.exists():
        held_out = any(record["split"] == "heldout" for _, record in iter_records(prompts))
    if not config.evaluate.sources and not held_out:
        raise nothing_held_out_error(run)
    return reference


def existing_evaluation(run: Run, config: Config) -> dict[str, Any] | None:
    """What was measured of this training under these settings, if that was gone through with."""
    stage, models = run.manifest()["stages"].get("evaluate", {}), evaluated_models(run, config)
    try:
        evaluation: dict[str, Any] = orjson.loads((run.path / EVALUATION_DIR / "evaluation.json").read_bytes())
        evaluation.keys()
    except (OSError, ValueError, AttributeError):
        return None
    same_settings = stage.get("config", {}).get("evaluate") == config.evaluate.model_dump(mode="json")
    complete = stage.get("ended") and not evaluation.get("stopped") and not stage["history"][-1].get("failures")
    return evaluation if same_settings and complete and evaluation.get("trained") == models.trained else None


def nothing_held_out_error(run: Run) -> UsageError:
    return UsageError(
        "no prompt was held out",
        location=str(run.path),
        hint="Name prompts that are not trained on: --prompts SRC, or source under [evaluate]; next time, leave "
        "heldout_fraction above 0.",
    )
