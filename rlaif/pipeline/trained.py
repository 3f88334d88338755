"""What a training left, and what it is compared with: whether there is anything to evaluate, or nothing left to."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from rlaif.config import Config
from rlaif.errors import UsageError
from rlaif.llm.engines import Local
from rlaif.records import key_of
from rlaif.run.directory import Run
from rlaif.run.journal import read
from rlaif.train import checkpoints

FOLDER = "evaluation"
"""Of the run that an evaluation is, in the run's own."""
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The adapter ranks that vLLM has room for."""


@dataclass(frozen=True)
class Models:
    """The two that are compared. ``trained`` is a name that changes with the training; ``local`` is where it lies."""

    reference: str
    trained: str
    local: Local


def trained(run: Run, config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """The identity and the result of the last training. Raises :class:`UsageError` where there is none."""
    output = Path(config.train.output) if config.train.output else run.model
    try:
        stored = orjson.loads((output / "training.json").read_bytes())
        identity, result = dict(stored["identity"]), dict(stored["result"])
        identity["model"].strip()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(
            "no trained model is there", where=str(output), mend=f"Train first: rlaif train {run.path}"
        ) from None
    return identity, result


def models(run: Run, config: Config) -> Models:
    """The two to compare. Raises :class:`UsageError` where nothing was trained that answers."""
    identity, result = trained(run, config)
    output, reference = Path(config.train.output) if config.train.output else run.model, str(identity["model"])
    if identity.get("method") == "reward":
        raise UsageError("a reward model was trained, which does not answer", where=str(output),
                         mend="Examine it as a judge, or train with another --method.")  # fmt: skip
    name = f"{output.resolve().name}-{key_of(identity=identity, steps=result.get('steps'))[:8]}"
    if adapter := result.get("adapter"):
        return Models(reference, name, Local(name, str(adapter), base=reference, rank=_rank(Path(str(adapter)))))
    if merged := result.get("merged"):
        return Models(reference, name, Local(name, str(merged)))
    raise UsageError("the training left no model that answers", where=str(output), mend="Train with another --method.")


def _rank(adapter: Path) -> int:
    """The least that vLLM has room for and that holds this adapter's."""
    told = adapter / "adapter_config.json"
    try:
        rank = int(orjson.loads(told.read_bytes())["r"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError("the adapter's rank is not there", where=str(told), mend="Train again.") from None
    return next((each for each in RANKS if each >= rank), RANKS[-1])


def require(run: Run, config: Config, *, trains: bool) -> str:
    """The model that will be the reference of an evaluation at the end of a night. ``trains``: a training goes before.

    Raises :class:`UsageError` where it is known now that nothing can be evaluated then."""
    if trains and config.train.method == "reward":
        raise UsageError("a reward model does not answer, so it cannot be evaluated", where="train.method",
                         mend="Leave --evaluate away, or train with another --method.")  # fmt: skip
    named = [config.train.model, *(policy.model for policy in config.policies), *config.sampler.model, "its base"]
    reference = next(filter(None, named)) if trains else models(run, config).reference
    prompts = run.journal_path("prompts")
    held_out = config.prompts.heldout_share > 0
    if prompts.exists():
        held_out = any(record["split"] == "heldout" for _, record in read(prompts))
    if not config.evaluate.source and not held_out:
        raise nothing_held_out(run)
    return reference


def with_other_rows(run: Run, config: Config) -> list[str]:
    """What was trained here on other rows than the dataset has now, as lines to say; none where nothing was."""
    output = Path(config.train.output) if config.train.output else run.model
    if not (run.dataset / "train.parquet").exists():
        return []
    now = hashlib.sha256((run.dataset / "train.parquet").read_bytes()).hexdigest()
    done = _dataset((checkpoints.read(output / "training.json") or {}).get("identity"))
    folder = output / "checkpoints"
    begun = _dataset(checkpoints.read(folder / checkpoints.IDENTITY)) if any(folder.glob("checkpoint-*")) else None
    told = []
    if begun not in (None, now, done):
        told.append(f"the unfinished training in {output} is of other rows than the dataset has now: it begins anew, "
                    "and its checkpoints are removed")  # fmt: skip
    if done not in (None, now):
        told.append(f"the model in {output} was trained on other rows than the dataset has now: it is trained anew, "
                    "and the new one takes its place when it is done")  # fmt: skip
    return told


def _dataset(identity: Any) -> str | None:
    return identity.get("dataset") if isinstance(identity, dict) else None


def measured(run: Run, config: Config) -> dict[str, Any] | None:
    """What was measured of this training under these settings, if that was gone through with."""
    stage, both = run.manifest()["stages"].get("evaluate", {}), models(run, config)
    try:
        told: dict[str, Any] = orjson.loads((run.path / FOLDER / "evaluation.json").read_bytes())
        told.keys()
    except (OSError, ValueError, AttributeError):
        return None
    same = stage.get("config", {}).get("evaluate") == config.evaluate.model_dump(mode="json")
    whole = stage.get("ended") and not told.get("stopped") and not stage["history"][-1].get("failures")
    return told if same and whole and told.get("trained") == both.trained else None


def nothing_held_out(run: Run) -> UsageError:
    return UsageError(
        "no prompt was held out",
        where=str(run.path),
        mend="Name prompts that are not trained on: --prompts SRC, or source under [evaluate]; next time, leave "
        "heldout_share above 0.",
    )
