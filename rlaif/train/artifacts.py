"""What a training leaves under OUTPUT, and what a finished one says of itself.

Weights are written beside and then renamed, so that a folder is whole or not there.
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
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR,
    errno.EEXIST,
}  # fmt: skip

REVERSED_BELOW = 0.4


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a training came to. ``steps``: since its beginning; ``seconds``: of this call alone.

    ``loss``: mean over the last tenth of the steps. ``accuracy_*``: the share of ``n`` held-out pairs in which the
    model finds the chosen answer likelier, a token, than the rejected one. ``moved``: the share in which training made
    the chosen answer relatively likelier than it was (TRL's reward accuracy); 0.5 is chance. None without test pairs.
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
        """How many held-out pairs the accuracies were measured on."""
        return self.accuracy_after.n if self.accuracy_after else 0

    @property
    def reversed(self) -> Estimate | None:
        """By how few of the held-out pairs training went where their labels point, where that is far below one half.

        Of a language model only what training moved is asked: answers of a stronger model are chosen and yet less
        likely, before and after."""
        estimate = self.moved or self.accuracy_after
        return (
            estimate if estimate and estimate.n >= preflight.MIN_TEST_PAIRS and estimate.high < REVERSED_BELOW else None
        )

    def paths(self) -> dict[str, Path]:
        """What was written, by name."""
        artifacts = {"adapter": self.adapter, "merged": self.merged, "card": self.output / "README.md"}
        return {name: path for name, path in artifacts.items() if path is not None}


def load_tokenizer(name: str, path: str) -> Any:
    from transformers import AutoTokenizer

    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").exists():
        merged = folder / "merged"
        content = "an adapter, not a whole model" if (folder / "adapter_config.json").exists() else "no model"
        hint = (
            f"Give --model {merged}" if (merged / "config.json").exists() else "Give a folder that has a config.json."
        )
        raise UsageError(f"the folder holds {content}", location=path, hint=hint)
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise model_load_error(name, error) from error


def model_load_error(name: str, error: Exception) -> UsageError:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UsageError(
        f"the model {name!r} cannot be loaded: {first}",
        hint="Give --model with a local folder, or a hub name whose weights are safetensors.",
    )


def save_weights(
    trainer: Any, name: str, path: str, output: Path, *, head: Head, lora: bool, merge: bool
) -> tuple[Path | None, Path | None]:
    """Write the trained weights of the model ``name`` at ``path`` under ``output``: (adapter, merged).

    Called by every process of a training, whose parts are gathered; the main one writes.
    """
    from transformers import AutoConfig

    state_dict = (
        trainer.accelerator.get_state_dict(trainer.model_wrapped) if trainer.accelerator.num_processes > 1 else None
    )
    adapter, merged = output / "adapter", output / "merged"
    if not trainer.accelerator.is_main_process:
        return (adapter, merged if merge else None) if lora else (None, merged)
    remove_stale_temp_files(output)
    base_tokenizer = load_tokenizer(name, path)  # as the base has it: the trainer sets a padding token
    if not lora:
        # In the precision of the base: servers choose theirs by it, and training keeps float32.
        base_dtype = AutoConfig.from_pretrained(path, trust_remote_code=False).dtype
        model = trainer.accelerator.unwrap_model(trainer.model)
        with atomic_path(merged) as folder:
            if state_dict is None:
                model.to(base_dtype).save_pretrained(folder)
            else:
                model.config.dtype = base_dtype
                state_dict = {
                    key: value.to(base_dtype) if value.is_floating_point() else value
                    for key, value in state_dict.items()
                }
                model.save_pretrained(folder, state_dict=state_dict)
            base_tokenizer.save_pretrained(folder)
        return None, merged
    with atomic_path(adapter) as folder:
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(folder, state_dict=state_dict)
        base_tokenizer.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)  # peft's blank form: ours stands one folder up
    if not merge:
        return adapter, None
    with atomic_path(merged) as folder:
        _merge_adapter(path, adapter, head, trainer.model.config.pad_token_id).save_pretrained(folder)
        base_tokenizer.save_pretrained(folder)
    return adapter, merged


def _merge_adapter(path: str, adapter: Path, head: Head, pad: int | None) -> Any:
    """Base and adapter as one model, in the base's precision."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    options: dict[str, Any] = {"dtype": "auto", "use_safetensors": True, "trust_remote_code": False}
    if head == "language":
        base = AutoModelForCausalLM.from_pretrained(path, **options)
    else:
        # The score is read at the last token that is no padding, so the model has to know which is.
        base = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, pad_token_id=pad, **options)
    return PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()


def finished_result(output: Path, fingerprint: dict[str, Any], *, merge: bool) -> TrainResult | None:
    """The result of a training of this identity that ran to its end and is still there."""
    facts = checkpoints.read_json(output / "training.json")
    result = load_result(output)
    if facts is None or result is None or facts.get("identity") != fingerprint:
        return None
    required = [result.adapter or result.merged, *([result.merged] if merge else [])]
    return result if all(path is not None and path.is_dir() for path in required) else None


def load_result(output: Path) -> TrainResult | None:
    """The result that the last training in ``output`` wrote, whatever it was."""
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
    return {
        name: str(value) if isinstance(value, Path) else value for name, value in dataclasses.asdict(result).items()
    }


def disk_error(error: Exception) -> str | None:
    """Why the disk took no more, if that is what ``error`` says; each library has its own way of saying it."""
    code = error.errno if isinstance(error, OSError) else None
    if code is None and (match := re.search(r"\(os error (\d+)\)", str(error))):  # safetensors and tokenizers
        code = int(match[1])
    if code is not None and code in DISK_ERRNOS:
        return os.strerror(code)
    if "PytorchStreamWriter failed" in str(error) or "unexpected pos" in str(error):  # torch names no reason
        return "the disk took only a part of a file"
    return None
