"""The stages joined into commands: the only place that knows several of them, and what notebooks call.

    night.py      all of it as one job: checks, pilot, estimate, stages, notification
    checks.py     what can stand in a night's way, before anything is asked
    outlook.py    what it will take, and how its time and money are shared out
    forecast.py   what a number of prompts takes, with its figures from workload.py
    sources.py    what a run would take of prompt files
    publish.py    the dataset to the hub or object storage
    diary.py      its log, and who is told of its end
    commands.py   generate, import_completions, judge, rebuild, train and what it would do
    rounds.py     whom the judges are asked about, round by round
    evaluate.py   the trained model against its reference; measures.py: what was found; trained.py: what a training left
    serving.py    a run's models kept up on a cluster
    plan.py       what a command would ask, for --dry-run
    gather.py     what is known of the candidates before anything is decided over all of them
    build.py      tables/ and dataset/ from that
    people.py     the review page, with the judges' rubrics and gold pairs

Each command takes a run, its settings and a :class:`Watch` that is told what happens, holds the run's lock while it
writes, and may be called again: what is journaled is not asked for twice.
"""

from rlaif.pipeline.commands import (
    Watch,
    generate,
    hand_over,
    import_completions,
    judge,
    plan_train,
    rebuild,
    train,
)
from rlaif.pipeline.evaluate import evaluate, plan_evaluate
from rlaif.pipeline.night import whole_night
from rlaif.pipeline.people import review
from rlaif.pipeline.plan import plan_generate, plan_judge
from rlaif.pipeline.workload import plan_night

__all__ = [
    "Watch",
    "evaluate",
    "generate",
    "hand_over",
    "import_completions",
    "judge",
    "plan_evaluate",
    "plan_generate",
    "plan_judge",
    "plan_night",
    "plan_train",
    "rebuild",
    "review",
    "train",
    "whole_night",
]
