"""The review page as a Starlette application, and the server that runs it.

Every person's page lies under a prefix of their own, and so do its requests:

    /p/TOKEN/            who it is, the token says (the lead's page where it is the lead's)
    /  and  /lead/       the one annotator and the lead, where no links are needed
      GET  adjudicate    the lead's view of pairs on which people disagree
      GET  api/next      ?tab=&loaded=id,id&count=   pairs that come next
      GET  api/item      ?id=                      a pair that one goes back to
      GET  api/dashboard the lead's numbers
      POST api/label     {id, choice, comment, edited_response, confidence, seconds}; answered when it is on the disk

Errors come as {"error", "hint"} with a status; a label that could not be written is never answered with 200.
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
from rlaif.records import Choice, format_validation_error
from rlaif.review import dashboard
from rlaif.review.annotators import Annotator, AnnotatorRegistry
from rlaif.review.assignment import AssignmentService
from rlaif.web import markdown
from rlaif.web.security import SecurityMiddleware

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

PACKAGE_DIR = Path(__file__).resolve().parent
URL_PREFIXES = ("", "/lead", "/p/{token}")
MAX_PAIRS_PER_REQUEST = 5


class LabelSubmission(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    choice: Choice
    comment: str = ""
    edited_response: str | None = None
    confidence: int | None = Field(default=None, ge=1, le=3)
    seconds: float | None = Field(default=None, ge=0, lt=1e7)


@dataclass(frozen=True)
class PageContext:
    """What the page is about: the run's name, the guidelines as Markdown, and who reads it."""

    assignments: AssignmentService
    registry: AnnotatorRegistry
    title: str
    guidelines: str


def create_app(context: PageContext, host: str) -> Starlette:
    """The ASGI application. Raises :class:`rlaif.errors.MissingDependencyError` where the ``review`` extra is not
    installed."""
    markdown.require_review_extra()
    from jinja2 import Environment, FileSystemLoader
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.responses import HTMLResponse, PlainTextResponse, Response
    from starlette.routing import Mount, Route
    from starlette.staticfiles import StaticFiles

    environment = Environment(loader=FileSystemLoader(PACKAGE_DIR / "templates"), autoescape=True, trim_blocks=True)
    guidelines = markdown.markdown_to_safe_html(context.guidelines) or ""
    assignments, registry = context.assignments, context.registry

    def current_annotator(request: Request) -> Annotator:
        token = request.path_params.get("token")
        if token is not None:
            annotator = registry.find_by_token(token)
        elif not registry.without_links:
            annotator = None
        else:
            annotator = registry.lead if request.url.path.startswith("/lead/") else registry.annotators[0]
        if annotator is None:
            raise _HttpError(403, "this page needs a link of your own", "Ask whoever started the review for yours.")
        return annotator

    def json_response(value: Any, status: int = 200) -> Response:
        return Response(orjson.dumps(value), status, media_type="application/json")

    def json_endpoint(handler: Callable[[Annotator, dict[str, str], bytes], Any]) -> Callable[[Request], Any]:
        async def endpoint(request: Request) -> Response:
            try:
                annotator = current_annotator(request)
                if request.method == "POST" and not registry.is_valid_csrf_token(
                    annotator, request.headers.get("x-csrf-token", "")
                ):
                    raise _HttpError(403, "this page was opened before the links were made anew", "Reload it.")
                body = await request.body() if request.method == "POST" else b""
                return json_response(await run_in_threadpool(handler, annotator, dict(request.query_params), body))
            except _HttpError as http_error:
                return json_response({"error": http_error.message, "hint": http_error.hint}, http_error.status)
            except UsageError as error:
                return json_response({"error": error.message, "hint": error.hint}, 422)
            except RlaifError as error:
                return json_response({"error": str(error).partition("\n")[0], "hint": error.hint}, 503)

        return endpoint

    def next_pairs(annotator: Annotator, query: dict[str, str], _: bytes) -> Any:
        loaded = [pair for pair in query.get("loaded", "").split(",") if pair][: 4 * MAX_PAIRS_PER_REQUEST]
        requested = query.get("count", "")
        count = min(MAX_PAIRS_PER_REQUEST, int(requested)) if requested.isdecimal() else MAX_PAIRS_PER_REQUEST
        items = assignments.next_pairs(annotator, query.get("tab", ""), loaded, count)
        return {"items": items, "progress": assignments.progress(annotator)}

    def get_pair(annotator: Annotator, query: dict[str, str], _: bytes) -> Any:
        return assignments.get_pair(annotator, query.get("id", ""))

    def dashboard_data(annotator: Annotator, _: dict[str, str], __: bytes) -> Any:
        if not annotator.is_lead:
            raise _HttpError(403, "these numbers are the lead's", None)
        return dashboard.dashboard_data(assignments, registry, time.time())

    def submit_label(annotator: Annotator, _: dict[str, str], body: bytes) -> Any:
        try:
            submission = LabelSubmission.model_validate_json(body)
        except ValidationError as error:
            raise UsageError(f"not a label: {format_validation_error(error, LabelSubmission)}") from None
        result = assignments.submit_label(
            annotator,
            submission.id,
            submission.choice,
            comment=submission.comment,
            edited_response=submission.edited_response,
            confidence=submission.confidence,
            seconds=submission.seconds,
        )
        return {**result, "progress": assignments.progress(annotator)}

    def render_page(name: str, annotator: Annotator, **variables: Any) -> Response:
        html = environment.get_template(name).render(
            title=context.title,
            annotator=annotator,
            csrf=registry.csrf_token(annotator),
            guidelines=guidelines,
            **variables,
        )
        return HTMLResponse(html)

    def home_page(request: Request) -> Response:
        try:
            annotator = current_annotator(request)
        except _HttpError as http_error:
            return HTMLResponse(environment.get_template("error.html").render(error=http_error), http_error.status)
        if not request.url.path.endswith("/"):
            return Response(status_code=307, headers={"location": f"{request.url.path}/"})
        if annotator.is_lead:
            return render_page("lead.html", annotator)
        return render_page("label.html", annotator, history=assignments.labeled_pairs(annotator)[-200:])

    def adjudication_page(request: Request) -> Response:
        try:
            annotator = current_annotator(request)
            if not annotator.is_lead:
                raise _HttpError(403, "adjudication is the lead's", None)
        except _HttpError as http_error:
            return HTMLResponse(environment.get_template("error.html").render(error=http_error), http_error.status)
        return render_page("label.html", annotator, history=assignments.labeled_pairs(annotator)[-200:])

    async def favicon(_: Request) -> Response:
        return PlainTextResponse("", 204)

    routes: list[Any] = [
        Mount("/static", StaticFiles(directory=PACKAGE_DIR / "static")),
        Route("/favicon.ico", favicon),
    ]
    for prefix in URL_PREFIXES[::-1]:
        routes += [
            Route(f"{prefix}/api/next", json_endpoint(next_pairs)),
            Route(f"{prefix}/api/item", json_endpoint(get_pair)),
            Route(f"{prefix}/api/dashboard", json_endpoint(dashboard_data)),
            Route(f"{prefix}/api/label", json_endpoint(submit_label), methods=["POST"]),
            Route(f"{prefix}/adjudicate", adjudication_page),
            Route(f"{prefix}/", home_page),
            *([Route(prefix, home_page)] if prefix else []),
        ]
    return Starlette(routes=routes, middleware=[Middleware(SecurityMiddleware, host=host)])


class _HttpError(Exception):
    def __init__(self, status: int, message: str, hint: str | None) -> None:
        super().__init__(message)
        self.status, self.message, self.hint = status, message, hint


@contextlib.contextmanager
def bind_socket(host: str, port: int) -> Iterator[socket.socket]:
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
                hint="Is the page open already? Give --port N for another one, 0 for any that is free.",
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


def annotator_links(registry: AnnotatorRegistry, host: str, port: int) -> dict[str, str]:
    """Everybody's address by name, the lead's last."""
    display_host = f"[{host}]" if ":" in host else socket.getfqdn() if host == "0.0.0.0" else host  # noqa: S104
    base = f"http://{display_host}:{port}"
    if registry.without_links:
        return {registry.annotators[0].name: f"{base}/", registry.lead.name: f"{base}/lead/"}
    return {
        annotator.name: f"{base}/p/{registry.link_token(annotator)}/"
        for annotator in (*registry.annotators, registry.lead)
    }
