"""``rlaif review``: the review page, with the judges' rubrics as guidelines and their gold pairs as a test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rlaif.config.models import Config
from rlaif.errors import UsageError
from rlaif.judge import judge_file
from rlaif.review import web_app
from rlaif.review.annotators import AssignmentRules, load_registry
from rlaif.review.assignment import AssignmentService
from rlaif.review.gold_pairs import read_gold_pairs
from rlaif.run.run import Run
from rlaif.web.security import is_loopback


def serve_review_page(
    run: Run,
    config: Config,
    *,
    annotator: str | None,
    host: str,
    port: int,
    on_ready: Callable[[dict[str, str], AssignmentService], None],
) -> None:
    """Serve the review page until interrupted.

    ``annotator``: the only annotator; None for those of ``config.review``. ``on_ready`` is called with the annotators'
    links once the page answers. Raises :class:`rlaif.errors.RunError` if nothing is judged yet.
    """
    review_config = config.review
    registry = load_registry(run.path, review_config, annotator=annotator, links=not is_loopback(host))
    has_several = len(registry.annotators) > 1
    rules = AssignmentRules(
        labels_per_pair=min(review_config.labels_per_pair, len(registry.annotators)),
        extra_label_fraction=review_config.extra_label_fraction
        if has_several and review_config.labels_per_pair < len(registry.annotators)
        else 0.0,
        gold_fraction=0.0 if registry.without_links else review_config.gold_fraction,
    )
    judges = [judge_file.find_judge(entry.name) for entry in config.panel_members()]
    gold = read_gold_pairs(_gold_files(review_config.gold, judges)) if rules.gold_fraction else {}
    guidelines = _read_text(review_config.guidelines) if review_config.guidelines else _format_rubrics(judges)
    with AssignmentService(run, config.seed, rules, gold) as service:
        context = web_app.PageContext(
            assignments=service, registry=registry, title=run.path.resolve().name, guidelines=guidelines
        )
        application = web_app.create_app(context, host)
        with web_app.bind_socket(host, port) as listener:
            on_ready(web_app.annotator_links(registry, host, listener.getsockname()[1]), service)
            web_app.serve(application, listener)


def _gold_files(configured: str | None, judges: list[judge_file.Judge]) -> list[Path]:
    if configured:
        return [Path(configured)]
    return [
        path for judge in judges if judge.file.kind == "compare" and (path := judge.folder / "gold.jsonl").is_file()
    ]


def _format_rubrics(judges: list[judge_file.Judge]) -> str:
    """Return the judges' rubrics as guidelines: a comparing judge's system part, a rating judge's aspects."""
    sections = []
    for judge in judges:
        if judge.file.kind == "compare":
            sections.append(f"## {judge.name}\n\n{judge.system}")
        elif judge.file.aspects:
            aspects = [f"**{aspect.name.replace('_', ' ')}.** {aspect.text.strip()}" for aspect in judge.file.aspects]
            sections.append("\n\n".join([f"## {judge.name}", *aspects]))
    return "\n\n".join(sections) or "Which of the two answers would a careful person prefer to receive?"


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UsageError(
            f"cannot read the guidelines: {reason}", location=path, hint="Correct `guidelines` under [review]."
        ) from None
