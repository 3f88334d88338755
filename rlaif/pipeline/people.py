"""``rlaif review``: the page, with what the judges go by as guidelines and their gold pairs as a test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rlaif.config import Config
from rlaif.errors import UsageError
from rlaif.judge import definition
from rlaif.review import app
from rlaif.review.desk import Desk
from rlaif.review.gold import read_gold
from rlaif.review.guard import is_loopback
from rlaif.review.people import Rules, people_of
from rlaif.run.directory import Run


def review(
    run: Run,
    config: Config,
    *,
    annotator: str | None,
    host: str,
    port: int,
    ready: Callable[[dict[str, str], Desk], None],
) -> None:
    """Serve the page until interrupted. ``annotator`` is the one who labels; None is everybody of ``config.review``.

    ``ready`` is told the links once the page answers. Raises :class:`rlaif.errors.RunError` where nothing was judged.
    """
    settings = config.review
    people = people_of(run.path, settings, annotator=annotator, links=not is_loopback(host))
    several = len(people.annotators) > 1
    rules = Rules(
        labels=min(settings.labels, len(people.annotators)),
        overlap=settings.overlap if several and settings.labels < len(people.annotators) else 0.0,
        gold_share=0.0 if people.open else settings.gold_share,
    )
    judges = [definition.find(seat.name) for seat in config.panel()]
    gold = read_gold(_gold_files(settings.gold, judges)) if rules.gold_share else {}
    guidelines = _text(settings.guidelines) if settings.guidelines else _rubrics(judges)
    desk = Desk(run, config.seed, rules, gold)
    page = app.Page(desk=desk, people=people, title=run.path.resolve().name, guidelines=guidelines)
    application = app.application(page, host)
    try:
        with app.listening(host, port) as listener:
            ready(app.links(people, host, listener.getsockname()[1]), desk)
            app.serve(application, listener)
    finally:
        desk.close()


def _gold_files(given: str | None, judges: list[definition.Judge]) -> list[Path]:
    if given:
        return [Path(given)]
    return [
        path for judge in judges if judge.file.kind == "compare" and (path := judge.folder / "gold.jsonl").is_file()
    ]


def _rubrics(judges: list[definition.Judge]) -> str:
    """What the judges go by, for a person: a comparing judge's system part, a rating judge's aspects."""
    parts = []
    for judge in judges:
        if judge.file.kind == "compare":
            parts.append(f"## {judge.name}\n\n{judge.system}")
        elif judge.file.aspects:
            said = [f"**{aspect.name.replace('_', ' ')}.** {aspect.text.strip()}" for aspect in judge.file.aspects]
            parts.append("\n\n".join([f"## {judge.name}", *said]))
    return "\n\n".join(parts) or "Which of the two would a careful person rather have received?"


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UsageError(f"the guidelines cannot be read: {why}", where=path) from None
