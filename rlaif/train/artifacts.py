"""Files of a training under OUTPUT: the weights, and the result in training.json.

Folders of weights are replaced in one step, so that they are complete or missing.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlaif.errors import UsageError
from rlaif.run.atomic_write import atomic_path, remove_stale_temp_files
from rlaif.stats import Estimate
from rlaif.train import checkpoints, preflight
from rlaif.train.methods.base import Head

DISK_ERRNOS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ENOTDIR,
    errno.EEXIST,
}
"""Errors of a disk that is full, read-only or broken, or of a path that is taken."""

REVERSED_BELOW = 0.4
"""Share of held-out pairs below which labels are reported as possibly reversed."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """Result of a training. ``steps`` counts from its start; ``seconds`` is the time of this call only.

    ``loss``: mean over the last tenth of the steps. ``accuracy_before`` and ``accuracy_after``: share of the ``n``
    held-out pairs in which the chosen answer is more likely per token than the rejected one. ``moved``: share in which
    training made the chosen answer more likely relative to the rejected one (TRL's reward accuracy); chance is 0.5.
    These are None without held-out pairs.
    """

    output: Path
    adapter: Path | None
    merged: Path | None
    pairs: int
    steps: int
    seconds: float
    loss: float | None
    accuracy_before: Estimate | None = None
    accuracy_after: Estimate | None = None
    moved: Estimate | None = None
    resumed_from: int | None = None

    @property
    def n(self) -> int:
        """Number of held-out pairs on which the accuracies were measured."""
        return self.accuracy_after.n if self.accuracy_after else 0

    @property
    def reversed(self) -> Estimate | None:
        """Share of held-out pairs in which training followed the labels, if it is far below one half; else None.

        For a language model that is ``moved``. Its accuracy is not used: chosen answers of a stronger model can be less
        likely before and after the training.
        """
        estimate = self.moved or self.accuracy_after
        return (
            estimate if estimate and estimate.n >= preflight.MIN_TEST_PAIRS and estimate.high < REVERSED_BELOW else None
        )

    def paths(self) -> dict[str, Path]:
        """Return the paths of the adapter, the merged model and the card, by name, as far as they were written."""
        artifacts = {"adapter": self.adapter, "merged": self.merged, "card": self.output / "README.md"}
        return {name: path for name, path in artifacts.items() if path is not None}


def load_tokenizer(name: str, path: str) -> Any:
    """Load the tokenizer of the model ``name`` at ``path``. Raises :class:`UsageError` if the model is missing."""
    from transformers import AutoTokenizer

    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").exists():
        merged = folder / "merged"
        content = "an adapter, not a complete model" if (folder / "adapter_config.json").exists() else "no model"
        has_merged = (merged / "config.json").exists()
        hint = f"Pass `--model {merged}`." if has_merged else "Pass `--model` with a folder that has a config.json."
        raise UsageError(f"the folder contains {content}", location=path, hint=hint)
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise model_load_error(name, error) from error


def model_load_error(name: str, error: Exception) -> UsageError:
    """Build the error for a model that transformers cannot load."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UsageError(
        f"the model {name!r} cannot be loaded: {first}",
        hint="Pass `--model` with a local folder, or the name of a model on the hub that has safetensors weights.",
    )


def save_weights(
    trainer: Any, name: str, path: str, output: Path, *, head: Head, lora: bool, merge: bool
) -> tuple[Path | None, Path | None]:
    """Write the trained weights of the model ``name`` at ``path`` under ``output``, and return (adapter, merged).

    Every process of the training must call this, because the weights are gathered from all of them. The main process
    writes.
    """
    state_dict = (
        trainer.accelerator.get_state_dict(trainer.model_wrapped) if trainer.accelerator.num_processes > 1 else None
    )
    adapter, merged = output / "adapter", output / "merged"
    if not trainer.accelerator.is_main_process:
        return (adapter, merged if merge else None) if lora else (None, merged)
    remove_stale_temp_files(output)
    base_tokenizer = load_tokenizer(name, path)  # the base's own: the trainer sets a padding token
    if not lora:
        with atomic_path(merged) as folder:
            _save_full_model(trainer, path, folder, state_dict)
            base_tokenizer.save_pretrained(folder)
        return None, merged
    with atomic_path(adapter) as folder:
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(folder, state_dict=state_dict)
        base_tokenizer.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)  # peft's template: our card is one folder up
    if not merge:
        return adapter, None
    with atomic_path(merged) as folder:
        _merge_adapter(path, adapter, head, trainer.model.config.pad_token_id).save_pretrained(folder)
        base_tokenizer.save_pretrained(folder)
    return adapter, merged


def _save_full_model(trainer: Any, path: str, folder: Path, state_dict: dict[str, Any] | None) -> None:
    """Write all weights to ``folder``. ``state_dict``: the gathered weights, if several processes hold them."""
    from transformers import AutoConfig

    # In the precision of the base, from which servers choose theirs. Training uses float32.
    base_dtype = AutoConfig.from_pretrained(path, trust_remote_code=False).dtype
    model = trainer.accelerator.unwrap_model(trainer.model)
    if state_dict is None:
        model.to(base_dtype).save_pretrained(folder)
        return
    model.config.dtype = base_dtype
    converted = {key: value.to(base_dtype) if value.is_floating_point() else value for key, value in state_dict.items()}
    model.save_pretrained(folder, state_dict=converted)


def _merge_adapter(path: str, adapter: Path, head: Head, pad: int | None) -> Any:
    """Return base and adapter merged into one model, in the base's precision."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    options: dict[str, Any] = {"dtype": "auto", "use_safetensors": True, "trust_remote_code": False}
    if head == "language":
        base = AutoModelForCausalLM.from_pretrained(path, **options)
    else:
        # The score is read at the last token that is not padding, so the model must know the padding token.
        base = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, pad_token_id=pad, **options)
    return PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()


def finished_result(output: Path, fingerprint: dict[str, Any], *, merge: bool) -> TrainResult | None:
    """Return the result of a finished training with this fingerprint, if its files still exist; else None."""
    facts = checkpoints.read_json(output / "training.json")
    result = load_result(output)
    if facts is None or result is None or facts.get("identity") != fingerprint:
        return None
    required = [result.adapter or result.merged, *([result.merged] if merge else [])]
    return result if all(path is not None and path.is_dir() for path in required) else None


def load_result(output: Path) -> TrainResult | None:
    """Return the result of the last training in ``output``, whatever its settings; None if there is none."""
    facts = checkpoints.read_json(output / "training.json")
    if facts is None:
        return None
    values = dict(facts["result"])
    for name in ("output", "adapter", "merged"):
        values[name] = Path(values[name]) if values[name] else None
    for name in ("accuracy_before", "accuracy_after", "moved"):
        values[name] = Estimate(**values[name]) if values[name] else None
    return TrainResult(**values)


def result_as_json(result: TrainResult) -> dict[str, Any]:
    """Return ``result`` as JSON values; paths become strings."""
    return {
        name: str(value) if isinstance(value, Path) else value for name, value in dataclasses.asdict(result).items()
    }


def disk_error(error: Exception) -> str | None:
    """Return the reason if the disk could not be written, else None. Each library reports that differently."""
    code = error.errno if isinstance(error, OSError) else None
    if code is None and (match := re.search(r"\(os error (\d+)\)", str(error))):  # safetensors and tokenizers
        code = int(match[1])
    if code is not None and code in DISK_ERRNOS:
        return os.strerror(code)
    if "PytorchStreamWriter failed" in str(error) or "unexpected pos" in str(error):  # torch gives no reason
        return "only a part of a file was written to the disk"
    return None
