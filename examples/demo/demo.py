"""The whole of rlaif in a few minutes on a CPU, and an example of its Python API:

    .venv/bin/python examples/demo/demo.py [RUN]          (default: demo)

Prompts are answered by a small model in a real vLLM, judged by it in both orders, paired, and trained on by TRL. The
first prompts are measured: a slow machine is asked for fewer of them, so that the demo ends near TARGET_S. It can be
stopped or killed at any point; the same command goes on from there. Each step names the command that does the same.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl

from rlaif import pipeline, settings
from rlaif.cli.console import INTERRUPTED, Console
from rlaif.cli.console import run as run_command
from rlaif.llm.budget import duration
from rlaif.llm.engines import Engines
from rlaif.pipeline import outlook, sources
from rlaif.pipeline.commands import Judged
from rlaif.report import gather, page
from rlaif.run import whole
from rlaif.run.directory import Run

SETTINGS = Path(__file__).with_name("rlaif.toml")
TARGET_S = 360.0
FIRST = 8
"""Prompts that are measured before it is decided how many there are to be."""
MORE = 4
"""Prompts that are added at a time if there are too few pairs."""
SHOWN = 3
WIDTH = 100


def demo(path: Path, clock: Callable[[], float] = time.monotonic) -> None:
    began = clock()
    run = Run(path)
    if not (path / settings.FILE_NAME).exists():
        path.mkdir(parents=True, exist_ok=True)
        whole.write(path / settings.FILE_NAME, SETTINGS.read_bytes())
    show(f"Settings: {path / settings.FILE_NAME}")
    config = settings.load(path, {})
    watch = Console()

    # One Engines for all stages: a model that the next stage needs stays up.
    with Engines(run.log, config.client, watch.say, config.cluster) as engines:
        everything = config.prompts.limit or sources.look(config.prompts.source, config).prompts
        before, decided = earlier(run)
        count = min(max(FIRST, before), everything)
        judged = ask(run, count, watch, engines)
        if not decided:
            while (per_prompt := seconds_per_prompt(run, count)) is None and count < everything:
                count = min(count + MORE, everything)  # a killed start left answers, but not what they took
                judged = ask(run, count, watch, engines)
            left = (TARGET_S - (clock() - began)) * (1 - config.run.train_share)
            wanted = affordable(count, everything, left, per_prompt or 0.0)
            if count < everything:
                show(estimate(count, wanted, everything, per_prompt or 0.0))
            decide(run, wanted)
            if wanted > count:
                count, judged = wanted, ask(run, wanted, watch, engines)
        while not enough(judged) and count < everything:
            show(f"There is no pair for {'people to review' if judged.built.merged.train else 'training'} yet.")
            count = min(count + MORE, everything)
            judged = ask(run, count, watch, engines)

    step(f"rlaif train {path}", "A LoRA adapter, trained on the pairs by TRL's DPOTrainer")
    trained = pipeline.train(run, config, watch, anew=True)
    show(f"Trained on {trained.pairs} pairs in {trained.steps} steps: {trained.adapter or trained.output}")

    step(f"rlaif report {path}", "What the run gave, as a page")
    report = page.write(run)
    show(f"Done in {duration(clock() - began)}. To look at:")
    show(f"  report      {report.resolve()}")
    show(f"  dataset     {run.dataset / 'train.parquet'}, {judged.built.merged.train} pairs, among them:")
    for row in pl.read_parquet(run.dataset / "train.parquet").head(SHOWN).to_dicts():
        for side in ("prompt", "chosen", "rejected"):
            show(f"    {side:<9} {shortened(row[side][-1]['content'])}")
        show()
    show(f"  queue       {queued(judged)} of the pairs are for people to label, blind: rlaif review {path}")
    show(worth(gather.gather(run, samples=False)))


def ask(run: Run, prompts: int, watch: Console, engines: Engines) -> Judged:
    """Answer and judge the first ``prompts``. What an earlier call or start has done is not asked for again."""
    config = settings.load(run.path, {"prompts.limit": prompts})
    step(f"rlaif generate {run.path} --limit {prompts}", f"{config.sampler.n} answers to each of {prompts} prompts")
    pipeline.generate(run, config, watch, engines)
    step(f"rlaif judge {run.path}", "Each answer rated, the best and the worst compared in both orders, pairs built")
    judged = pipeline.judge(run, config, watch, engines)
    show(f"{judged.built.merged.train} pairs to train on, {queued(judged)} for people to review")
    return judged


def earlier(run: Run) -> tuple[int, bool]:
    """How many prompts an earlier start asked, and whether it decided on their number."""
    stage: dict[str, Any] = run.manifest()["stages"].get("generate", {})
    asked = stage["config"]["prompts"]["limit"] or 0 if stage else 0
    return max(asked, stage.get("demo_prompts", 0)), "demo_prompts" in stage


def decide(run: Run, prompts: int) -> None:
    """Remember the number of prompts, so that a later start asks neither fewer nor more."""
    with run.writing():
        run.update_manifest("generate", demo_prompts=prompts)


def seconds_per_prompt(run: Run, prompts: int) -> float | None:
    """How long a prompt took to answer and to judge, by all starts together, without vLLM's start."""
    facts = outlook.facts_of(run, prompts, outlook.answered(run))
    if not facts["generate"]["requests"] or not facts["judge"]["requests"]:
        return None
    return float(facts["generate"]["asking_s"] + facts["judge"]["asking_s"]) / prompts


def affordable(asked: int, everything: int, left_s: float, per_prompt: float) -> int:
    """How many prompts there are to be, if the rest of them may take ``left_s`` seconds."""
    if not per_prompt:
        return everything
    return min(everything, asked + max(0, int(left_s / per_prompt)))


def estimate(asked: int, wanted: int, everything: int, per_prompt: float) -> str:
    took = f"{asked} of {everything} prompts took {duration(asked * per_prompt)}"
    rest = duration((everything - asked) * per_prompt)
    if wanted == everything:
        return f"{took}; the rest will take about {rest}."
    more = f"{wanted - asked} more ({duration((wanted - asked) * per_prompt)})" if wanted > asked else "no more"
    return f"{took}, so the rest would take about {rest}. To end soon, this machine is asked for {more}."


def enough(judged: Judged) -> bool:
    """Whether there is a pair for people and one to train on."""
    return queued(judged) > 0 and judged.built.merged.train > 0


def queued(judged: Judged) -> int:
    return judged.built.routes["audit"] + judged.built.routes["targeted"]


def worth(facts: dict[str, Any]) -> str:
    """What the labels of these judges are worth, as measured in this run."""
    lines = []
    for judge in facts["orders"]:
        same = judge["consistent"]
        by_position = round(same["n"] * (1 - same["value"]))
        lines.append(
            f"What the labels are worth: in {by_position} of {same['n']} pairs {judge['judge']} by {judge['model']} "
            "chose by position, not by content."
        )
    lines.append(
        "A model of 135 million parameters is no judge: this shows the parts at work. `rlaif judges exam NAME --model "
        "MODEL` measures one before you trust it."
    )
    return "\n".join(lines)


def step(command: str, what: str) -> None:
    show(f"\n== {what}\n   $ {command}")


def show(line: str = "") -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def shortened(text: str) -> str:
    """One line for the terminal. What a model wrote may hold control characters: they are shown, not obeyed."""
    line = " ".join(text.split())
    plain = "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in line)
    return plain if len(plain) <= WIDTH else f"{plain[: WIDTH - 3]}..."


def main() -> None:
    try:
        demo(Path(sys.argv[1] if len(sys.argv) > 1 else "demo"))
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted; what came in is kept, and the same command goes on from here\n")
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    run_command(main)
