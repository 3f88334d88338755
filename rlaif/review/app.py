"""The review page as a Starlette application, and the server that runs it.

Every person's page lies under a prefix of their own, and so do its requests:

    /p/TOKEN/            who it is, the token says (the lead's page where it is the lead's)
    /  and  /lead/       the one annotator and the lead, where no links are needed
      GET  adjudicate    the lead's view of pairs on which people disagree
      GET  api/next      ?tab=&have=id,id&count=   pairs that come next
      GET  api/item      ?id=                      a pair that one goes back to
      GET  api/facts     the lead's numbers
      POST api/label     {id, choice, comment, edited, sure, seconds}; answered when it is on the disk

Errors come as {"error", "mend"} with a status; a label that could not be written is never answered with 200.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rlaif.errors import RlaifError, UsageError
from rlaif.records import Choice, explain
from rlaif.review import lead, render
from rlaif.review.desk import Desk
from rlaif.review.guard import Guard
from rlaif.review.people import People, Person

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

FILES = Path(__file__).resolve().parent
PREFIXES = ("", "/lead", "/p/{token}")
AT_A_TIME = 5


class Label(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    choice: Choice
    comment: str = ""
    edited: str | None = None
    sure: int | None = Field(default=None, ge=1, le=3)
    seconds: float | None = Field(default=None, ge=0, lt=1e7)


@dataclass(frozen=True)
class Page:
    """What the page is about: the run's name, the guidelines as Markdown, and who reads it."""

    desk: Desk
    people: People
    title: str
    guidelines: str


def application(page: Page, host: str) -> Starlette:
    """The ASGI application. Raises :class:`rlaif.errors.MissingPart` where the ``review`` extra is not installed."""
    render.require()
    from jinja2 import Environment, FileSystemLoader
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.responses import HTMLResponse, PlainTextResponse, Response
    from starlette.routing import Mount, Route
    from starlette.staticfiles import StaticFiles

    environment = Environment(loader=FileSystemLoader(FILES / "templates"), autoescape=True, trim_blocks=True)
    guidelines = render.to_html(page.guidelines) or ""
    desk, people = page.desk, page.people

    def who(request: Request) -> Person:
        token = request.path_params.get("token")
        if token is not None:
            person = people.by_token(token)
        elif not people.open:
            person = None
        else:
            person = people.lead if request.url.path.startswith("/lead/") else people.annotators[0]
        if person is None:
            raise _Refused(403, "this page needs a link of your own", "Ask whoever started the review for yours.")
        return person

    def json(value: Any, status: int = 200) -> Response:
        return Response(orjson.dumps(value), status, media_type="application/json")

    def answers(act: Callable[[Person, dict[str, str], bytes], Any]) -> Callable[[Request], Any]:
        async def endpoint(request: Request) -> Response:
            try:
                person = who(request)
                if request.method == "POST" and not people.is_csrf(person, request.headers.get("x-csrf-token", "")):
                    raise _Refused(403, "this page was opened before the links were made anew", "Reload it.")
                body = await request.body() if request.method == "POST" else b""
                return json(await run_in_threadpool(act, person, dict(request.query_params), body))
            except _Refused as refused:
                return json({"error": refused.what, "mend": refused.mend}, refused.status)
            except UsageError as error:
                return json({"error": error.what, "mend": error.mend}, 422)
            except RlaifError as error:
                return json({"error": str(error).partition("\n")[0], "mend": error.mend}, 503)

        return endpoint

    def next_(person: Person, query: dict[str, str], _: bytes) -> Any:
        have = [pair for pair in query.get("have", "").split(",") if pair][: 4 * AT_A_TIME]
        asked = query.get("count", "")
        count = min(AT_A_TIME, int(asked)) if asked.isdecimal() else AT_A_TIME
        items = desk.next(person, query.get("tab", ""), have, count)
        return {"items": items, "progress": desk.progress(person)}

    def item(person: Person, query: dict[str, str], _: bytes) -> Any:
        return desk.one(person, query.get("id", ""))

    def facts(person: Person, _: dict[str, str], __: bytes) -> Any:
        if not person.is_lead:
            raise _Refused(403, "these numbers are the lead's", None)
        return lead.facts(desk, people, time.time())

    def label(person: Person, _: dict[str, str], body: bytes) -> Any:
        try:
            said = Label.model_validate_json(body)
        except ValidationError as error:
            raise UsageError(f"not a label: {explain(error, Label)}") from None
        done = desk.submit(person, said.id, said.choice, comment=said.comment, edited=said.edited, sure=said.sure,
                           seconds=said.seconds)  # fmt: skip
        return {**done, "progress": desk.progress(person)}

    def show(name: str, person: Person, **more: Any) -> Response:
        html = environment.get_template(name).render(
            title=page.title, person=person, csrf=people.csrf(person), guidelines=guidelines, **more
        )
        return HTMLResponse(html)

    def home(request: Request) -> Response:
        try:
            person = who(request)
        except _Refused as refused:
            return HTMLResponse(environment.get_template("refused.html").render(why=refused), refused.status)
        if not request.url.path.endswith("/"):
            return Response(status_code=307, headers={"location": f"{request.url.path}/"})
        if person.is_lead:
            return show("lead.html", person)
        return show("label.html", person, history=desk.history(person)[-200:])

    def adjudicate(request: Request) -> Response:
        try:
            person = who(request)
            if not person.is_lead:
                raise _Refused(403, "adjudication is the lead's", None)
        except _Refused as refused:
            return HTMLResponse(environment.get_template("refused.html").render(why=refused), refused.status)
        return show("label.html", person, history=desk.history(person)[-200:])

    async def icon(_: Request) -> Response:
        return PlainTextResponse("", 204)

    routes: list[Any] = [Mount("/static", StaticFiles(directory=FILES / "static")), Route("/favicon.ico", icon)]
    for prefix in PREFIXES[::-1]:
        routes += [
            Route(f"{prefix}/api/next", answers(next_)),
            Route(f"{prefix}/api/item", answers(item)),
            Route(f"{prefix}/api/facts", answers(facts)),
            Route(f"{prefix}/api/label", answers(label), methods=["POST"]),
            Route(f"{prefix}/adjudicate", adjudicate),
            Route(f"{prefix}/", home),
            *([Route(prefix, home)] if prefix else []),
        ]
    return Starlette(routes=routes, middleware=[Middleware(Guard, host=host)])


class _Refused(Exception):
    def __init__(self, status: int, what: str, mend: str | None) -> None:
        super().__init__(what)
        self.status, self.what, self.mend = status, what, mend


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket bound to ``host`` and ``port`` (0 is a free one). Raises :class:`UsageError` where it cannot be."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(128)
        except OSError as error:
            raise UsageError(
                f"cannot listen on {host} port {port}: {error.strerror or error}",
                mend="Is the page open already? Give --port N for another one, 0 for any that is free.",
            ) from None
        yield listener


def serve(app: Starlette, listener: socket.socket) -> None:
    """Answer until interrupted. What was answered is on the disk, so that nothing has to be finished."""
    import uvicorn

    config = uvicorn.Config(
        app, lifespan="off", access_log=False, log_level="warning", server_header=False, date_header=False,
        timeout_graceful_shutdown=2,
    )  # fmt: skip
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listener])


def links(people: People, host: str, port: int) -> dict[str, str]:
    """Everybody's address by name, the lead's last."""
    shown = f"[{host}]" if ":" in host else socket.getfqdn() if host == "0.0.0.0" else host  # noqa: S104
    base = f"http://{shown}:{port}"
    if people.open:
        return {people.annotators[0].name: f"{base}/", people.lead.name: f"{base}/lead/"}
    return {person.name: f"{base}/p/{people.token(person)}/" for person in (*people.annotators, people.lead)}
