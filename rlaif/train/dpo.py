"""Direct preference optimisation of the run's dataset with TRL's DPOTrainer, resumable, from preflight to model card.

Reads RUN/dataset and writes only under OUTPUT (``train.output``, else RUN/model):

    adapter/        the LoRA adapter (not with full training)
    merged/         a whole model with tokenizer and chat template, for any server: base and adapter, or all weights
    README.md       the model card            training.json   settings and results, for programs
    checkpoints/    what an interrupted training goes on from; may be removed when it is done

Given again after an interruption, it goes on from the newest whole checkpoint; given again after the end, it says so
and does nothing. Everything is safetensors, and no code from a model's repository is run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import importlib.util
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlaif.config import Config
from rlaif.errors import MissingPart, RunError, UsageError
from rlaif.llm import demo
from rlaif.run.directory import Run
from rlaif.stats import Estimate
from rlaif.train import card, checkpoints, measure, preflight, settings

if TYPE_CHECKING:
    import polars as pl

NOT_WRITABLE = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR,
    errno.EEXIST,
}  # fmt: skip
PARTS = ("torch", "trl", "peft", "accelerate")


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

    def paths(self) -> dict[str, Path]:
        """What was written, by name."""
        named = {"adapter": self.adapter, "merged": self.merged, "card": self.output / "README.md"}
        return {name: path for name, path in named.items() if path is not None}


@dataclass(frozen=True, slots=True)
class Prepared:
    """A training that passed its preflight: what would be trained on what."""

    model: str
    path: str
    train: pl.DataFrame
    test: pl.DataFrame | None
    digest: str
    findings: list[preflight.Finding]
    example: str


def prepare(run: Run, config: Config) -> Prepared:
    """All that can be found out without loading the model. Raises :class:`UsageError` where training is refused."""
    absent = [name for name in PARTS if importlib.util.find_spec(name) is None]
    if absent:
        raise MissingPart(f"{', '.join(absent)} is not installed", mend="Install it: pip install 'rlaif[train]'")
    name = settings.model_name(config)
    findings, train = preflight.check_rows(run.dataset)
    preflight.refuse(findings, where=run.dataset)
    assert train is not None  # refused otherwise
    path = demo.resolve(name)
    tokenizer = _tokenizer(name, path)
    findings += preflight.check_tokens(train, tokenizer, max_length=config.train.max_length)
    preflight.refuse(findings, where=run.dataset)
    digest = hashlib.sha256((run.dataset / "train.parquet").read_bytes()).hexdigest()
    test = _read_test(run.dataset / "test.parquet", config.seed)
    return Prepared(name, path, train, test, digest, findings, preflight.example(train, tokenizer))


def train(run: Run, config: Config, *, say: Callable[[str], None]) -> TrainResult:
    """Train, measure, write. ``say`` gets lines for the person who waits."""
    # TRL reports each training to the hub unless told not to. Whoever wants that sets it to 0.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    wanted = config.train
    prepared = prepare(run, config)
    output = Path(wanted.output) if wanted.output else run.model
    folder = output / "checkpoints"
    arguments = settings.arguments(wanted, seed=config.seed, folder=folder, pairs=prepared.train.height)
    identity = settings.identity(wanted, model=prepared.model, seed=config.seed, dataset=prepared.digest)
    if done := _finished(output, identity, merge=wanted.merge):
        say(f"already trained with these settings in {output}; remove it to train anew")
        return done
    try:
        checkpoints.claim(folder, identity, settings.GROWING)
        _tell(prepared, say)
        with _quiet():
            result = _train(prepared, config, arguments, output, say)
        card.write(output / "README.md", prepared, config, result)
        checkpoints.write(output / "training.json", {"identity": identity, "result": _as_json(result)})
    except Exception as error:
        reason = _not_writable(error)
        if reason is None:
            raise
        raise RunError(
            f"cannot be written: {reason}",
            where=str(getattr(error, "filename", None) or output),
            mend="Mend that and start again: it goes on from the newest checkpoint.",
        ) from error
    return result


def _tell(prepared: Prepared, say: Callable[[str], None]) -> None:
    """What the preflight found, and the first pair as the model will read it."""
    passed = [finding for finding in prepared.findings if finding.level == "pass"]
    lengths = "".join(f"; {finding.message}" for finding in passed if finding.name == "length")
    say(f"preflight: {len(passed)} of {len(prepared.findings)} checks passed{lengths}")
    for finding in prepared.findings:
        if finding.level == "warn":
            say(f"warning: {finding.message}" + (f". {finding.mend}" if finding.mend else ""))
    say(f"the first pair as the model reads it:\n{prepared.example}")


def _train(
    prepared: Prepared, config: Config, arguments: dict[str, Any], output: Path, say: Callable[[str], None]
) -> TrainResult:
    wanted = config.train
    trainer = _trainer(prepared, config, arguments)
    pairs = len(trainer.train_dataset)
    if pairs == 0:
        raise UsageError("every prompt fills max_length: no pair is left", mend="Raise max_length under [train].")
    planned = settings.planned_steps(wanted, pairs)
    trainer.add_callback(measure.teller(say, pairs_per_step=wanted.batch_size))
    resume, torn = checkpoints.newest(Path(trainer.args.output_dir))
    for path in torn:
        say(f"{path.name} is incomplete and passed over")
    begun = checkpoints.step(resume) if resume else 0
    what = "LoRA" if wanted.lora else "all weights"
    say(
        f"{f'going on from step {begun} of' if begun else 'training'} {planned} steps of {wanted.batch_size} pairs: "
        f"{what} of {prepared.model} on {pairs} pairs, {settings.dtype(wanted)}, "
        f"learning rate {arguments['learning_rate']:g}"
    )
    with measure.only_answers_scored(), _out_of_memory_explained():
        if prepared.test is not None:
            say(f"measuring {prepared.test.height} held-out pairs first")
        before = measure.likelihoods(trainer)  # of the base: a checkpoint is loaded after this
        started = time.monotonic()
        if resume and begun >= planned:
            # The trainer would take one more step. All that is missing is what comes after the last one.
            trainer._load_from_checkpoint(str(resume))
            trainer.state = trainer.state.load_from_json(str(resume / "trainer_state.json"))
        else:
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        seconds = time.monotonic() - started
        after = measure.likelihoods(trainer)
    adapter, merged = _write(trainer, prepared, wanted.lora, wanted.merge, output)
    result = TrainResult(
        output=output,
        adapter=adapter,
        merged=merged,
        pairs=pairs,
        steps=trainer.state.global_step,
        seconds=seconds,
        loss=measure.last_loss(trainer.state.log_history),
        accuracy_before=measure.accuracy(before),
        accuracy_after=measure.accuracy(after),
        moved=measure.moved(before, after),
        resumed_from=begun or None,
    )
    if result.accuracy_after:
        say(
            f"held-out pairs: the chosen answer is the likelier one in {result.accuracy_after} "
            f"(before: {result.accuracy_before}); training moved towards it in {result.moved}"
        )
    return result


def _trainer(prepared: Prepared, config: Config, arguments: dict[str, Any]) -> Any:
    from peft import LoraConfig
    from transformers import PrinterCallback
    from trl import DPOConfig, DPOTrainer

    wanted = config.train
    lora = LoraConfig(r=wanted.lora_r, lora_alpha=wanted.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    try:
        trainer = DPOTrainer(
            model=prepared.path,
            args=DPOConfig(**arguments),
            train_dataset=_dataset(prepared.train),
            eval_dataset=_dataset(prepared.test) if prepared.test is not None else None,
            processing_class=_tokenizer(prepared.model, prepared.path),
            peft_config=lora if wanted.lora else None,
        )
    except OSError as error:
        raise _cannot_load(prepared.model, error) from error
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UsageError(f"TRL refuses these settings: {error}", where="[train]") from error
    trainer.remove_callback(PrinterCallback)
    return trainer


def _tokenizer(name: str, path: str) -> Any:
    from transformers import AutoTokenizer

    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").exists():
        whole = folder / "merged"
        what = "an adapter, not a whole model" if (folder / "adapter_config.json").exists() else "no model"
        mend = f"Give --model {whole}" if (whole / "config.json").exists() else "Give a folder that has a config.json."
        raise UsageError(f"the folder holds {what}", where=path, mend=mend)
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _cannot_load(name, error) from error


def _cannot_load(name: str, error: Exception) -> UsageError:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UsageError(
        f"the model {name!r} cannot be loaded: {first}",
        mend="Give --model with a local folder, or a hub name whose weights are safetensors.",
    )


def _read_test(path: Path, seed: int) -> pl.DataFrame | None:
    """The held-out pairs to measure on: all, or so many drawn at random that their error is small enough."""
    import polars as pl

    if not path.exists():
        return None
    frame = pl.read_parquet(path)
    if frame.height > measure.TEST_PAIRS:
        frame = frame.sample(measure.TEST_PAIRS, seed=seed)
    return frame if frame.height else None


def _dataset(frame: pl.DataFrame) -> Any:
    """The rows as TRL takes them: only the columns that it trains on, so that it does not guess at the others."""
    import polars as pl
    from datasets import Dataset

    plain = pl.List(pl.Struct({"role": pl.String, "content": pl.String}))
    if all(frame.schema[side] == plain for side in preflight.SIDES):
        columns = [*preflight.SIDES, *(["tools"] if "tools" in frame.columns else [])]
        return Dataset.from_polars(frame.select(columns))
    # Turns that differ in their fields: as JSON, so that what one turn lacks does not come back as a null.
    from datasets import Features, Json, List, Value

    rows = [preflight.conversation(row) for row in frame.iter_rows(named=True)]
    features = Features({**{side: List(Json()) for side in preflight.SIDES}, "tools": Value("string")})
    texts = frame["tools"] if "tools" in frame.columns else [None] * len(rows)
    return Dataset.from_list([{**row, "tools": text} for row, text in zip(rows, texts, strict=True)], features=features)


def _write(trainer: Any, prepared: Prepared, lora: bool, merge: bool, output: Path) -> tuple[Path | None, Path | None]:
    """The trained weights under ``output``: (adapter, merged)."""
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = _tokenizer(prepared.model, prepared.path)  # as the base has it: the trainer sets a padding token
    adapter, merged = output / "adapter", output / "merged"
    if not lora:
        # In the precision of the base: servers choose theirs by it, and training keeps float32.
        kept = AutoConfig.from_pretrained(prepared.path, trust_remote_code=False).dtype
        with _replacing(merged) as folder:
            trainer.model.to(kept).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return None, merged
    with _replacing(adapter) as folder:
        trainer.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)  # peft's blank form: ours stands one folder up
    if not merge:
        return adapter, None
    base = AutoModelForCausalLM.from_pretrained(
        prepared.path, dtype="auto", use_safetensors=True, trust_remote_code=False
    )
    with _replacing(merged) as folder:
        PeftModel.from_pretrained(base, str(adapter)).merge_and_unload().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return adapter, merged


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of ``folder`` when all is written."""
    temporary = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def _finished(output: Path, identity: dict[str, Any], *, merge: bool) -> TrainResult | None:
    """The result of a training of this identity that ran to its end and is still there."""
    stored = checkpoints.read(output / "training.json")
    if stored is None or stored.get("identity") != identity:
        return None
    values = dict(stored["result"])
    for name in ("output", "adapter", "merged"):
        values[name] = Path(values[name]) if values[name] else None
    for name in ("accuracy_before", "accuracy_after", "moved"):
        values[name] = Estimate(**values[name]) if values[name] else None
    result = TrainResult(**values)
    wanted = [result.adapter or result.merged, *([result.merged] if merge else [])]
    return result if all(path is not None and path.is_dir() for path in wanted) else None


def _as_json(result: TrainResult) -> dict[str, Any]:
    return {
        name: str(value) if isinstance(value, Path) else value for name, value in dataclasses.asdict(result).items()
    }


def _not_writable(error: Exception) -> str | None:
    """Why the disk took no more, if that is what ``error`` says; each library has its own way of saying it."""
    code = error.errno if isinstance(error, OSError) else None
    if code is None and (said := re.search(r"\(os error (\d+)\)", str(error))):  # safetensors and tokenizers
        code = int(said[1])
    if code is not None and code in NOT_WRITABLE:
        return os.strerror(code)
    if "PytorchStreamWriter failed" in str(error) or "unexpected pos" in str(error):  # torch names no reason
        return "the disk took only a part of a file"
    return None


@contextlib.contextmanager
def _out_of_memory_explained() -> Iterator[None]:
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunError(
            "the device ran out of memory",
            mend="Set per_device_batch_size = 1 under [train] (the effective batch stays what it is, and training goes "
            "on from its checkpoint); else a smaller max_length, or LoRA.",
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' progress bars: ``say`` tells how far it is."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    bars, loading = not are_progress_bars_disabled(), logging.is_progress_bar_enabled()
    disable_progress_bars()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            enable_progress_bars()
        if loading:
            logging.enable_progress_bar()
