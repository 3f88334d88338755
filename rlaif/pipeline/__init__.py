"""The stages joined into commands: the only place that knows several of them, and what notebooks call.

    commands.py   generate, import_completions, judge, rebuild, train
    rounds.py     whom the judges are asked about, round by round
    evaluate.py   the trained model against its reference
    plan.py       what a command would ask, for --dry-run
    build.py      tables/ and dataset/ from what the rounds gave

Each command takes a run, its settings and a :class:`Watch` that is told what happens, holds the run's lock while it
writes, and may be called again: what is journaled is not asked for twice.
"""

from rlaif.pipeline.commands import Watch, generate, hand_over, import_completions, judge, rebuild, train
from rlaif.pipeline.evaluate import evaluate
from rlaif.pipeline.plan import plan_generate, plan_judge

__all__ = [
    "Watch",
    "evaluate",
    "generate",
    "hand_over",
    "import_completions",
    "judge",
    "plan_generate",
    "plan_judge",
    "rebuild",
    "train",
]
