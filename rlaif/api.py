"""Every command as a function, for the command line, scripts and notebooks.

Each function takes a :class:`~rlaif.run.run.Run`, its :class:`~rlaif.config.models.Config` and a
:class:`~rlaif.llm.reporter.Reporter` that receives log lines and progress. It holds the run's lock while it writes and
can be called again: requests that the journal has are not sent again.
"""

from rlaif.evaluate.run_evaluation import evaluate, plan_evaluate
from rlaif.llm.reporter import Reporter
from rlaif.orchestrator.review_session import serve_review_page
from rlaif.orchestrator.run_pipeline import run_pipeline
from rlaif.orchestrator.stages import (
    export_for_verl,
    generate,
    import_completions,
    judge,
    plan_train,
    rebuild_dataset,
    train,
)
from rlaif.planning.stage_plans import plan_generate, plan_judge
from rlaif.planning.workload import plan_run

__all__ = [
    "Reporter",
    "evaluate",
    "export_for_verl",
    "generate",
    "import_completions",
    "judge",
    "plan_evaluate",
    "plan_generate",
    "plan_judge",
    "plan_run",
    "plan_train",
    "rebuild_dataset",
    "run_pipeline",
    "serve_review_page",
    "train",
]
