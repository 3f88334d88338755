"""The review page as a Starlette application, and its server.

Every annotator's page and its requests have URLs under the annotator's own prefix:

    /p/TOKEN/            the token identifies the annotator or the lead
    /  and  /lead/       the only annotator and the lead, if no links are required
      GET  ./            the labeling page, or for the lead the dashboard
      GET  adjudicate    the lead's page for pairs on which annotators disagree
      GET  api/next      ?tab=&loaded=id,id&count=   the next pairs
      GET  api/item      ?id=                        a pair that the annotator reopens
      GET  api/dashboard the lead's dashboard data
      POST api/label     {id, choice, comment, edited_response, confidence, seconds}; replies when the label is on disk

Errors are {"error", "hint"} with an HTTP status. The reply to a label that was not written is never 200.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator, Mapping
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
    from starlette.routing import BaseRoute

PACKAGE_DIR = Path(__file__).resolve().parent
URL_PREFIXES = ("", "/lead", "/p/{token}")
MAX_PAIRS_PER_REQUEST = 5
MAX_HISTORY = 200
"""Newest labeled pairs that the labeling page can reopen."""


class LabelSubmission(BaseModel):
    """The body of ``POST api/label``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    choice: Choice
    comment: str = ""
    edited_response: str | None = None
    confidence: int | None = Field(default=None, ge=1, le=3)
    seconds: float | None = Field(default=None, ge=0, lt=1e7)


@dataclass(frozen=True)
class PageContext:
    """The content of the page, and its users. ``title`` is the run's name, ``guidelines`` are Markdown."""

    assignments: AssignmentService
    registry: AnnotatorRegistry
    title: str
    guidelines: str


def create_app(context: PageContext, host: str) -> Starlette:
    """Build the ASGI application.

    Raises :class:`rlaif.errors.MissingDependencyError` if the ``review`` extra is not installed.
    """
    markdown.require_review_extra()
    from starlette.applications import Starlette
    from starlette.middleware import Middleware

    pages, api = _Pages(context), _Api(context)
    routes = _static_routes()
    for prefix in URL_PREFIXES:
        routes += [*api.routes(prefix), *pages.routes(prefix)]
    return Starlette(routes=routes, middleware=[Middleware(SecurityMiddleware, host=host)])


class _HttpError(Exception):
    """A request that is answered with an HTTP error ``status``."""

    def __init__(self, status: int, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.hint = status, message, hint


def _authenticate(registry: AnnotatorRegistry, request: Request) -> Annotator:
    """Return the annotator or lead to whom the request's URL belongs. Raises :class:`_HttpError` if there is none."""
    token = request.path_params.get("token")
    if token is None and registry.without_links:
        return registry.lead if request.url.path.startswith("/lead/") else registry.annotators[0]
    annotator = registry.find_by_token(token) if token is not None else None
    if annotator is None:
        raise _HttpError(403, "this page requires a personal link", "Ask the person who started the review for yours.")
    return annotator


def _static_routes() -> list[BaseRoute]:
    from starlette.responses import PlainTextResponse
    from starlette.routing import Mount, Route
    from starlette.staticfiles import StaticFiles

    async def favicon(_: Request) -> Response:
        return PlainTextResponse("", 204)

    return [Mount("/static", StaticFiles(directory=PACKAGE_DIR / "static")), Route("/favicon.ico", favicon)]


class _Pages:
    """The HTML pages: labeling, dashboard, adjudication, and the error page."""

    def __init__(self, context: PageContext) -> None:
        from jinja2 import Environment, FileSystemLoader

        self._context = context
        self._templates = Environment(
            loader=FileSystemLoader(PACKAGE_DIR / "templates"), autoescape=True, trim_blocks=True
        )
        self._guidelines = markdown.markdown_to_safe_html(context.guidelines) or ""

    def routes(self, prefix: str) -> list[BaseRoute]:
        from starlette.routing import Route

        home = self._with_error_page(self._home)
        return [
            Route(f"{prefix}/adjudicate", self._with_error_page(self._adjudication)),
            Route(f"{prefix}/", home),
            *([Route(prefix, home)] if prefix else []),
        ]

    def _with_error_page(self, page: Callable[[Request, Annotator], Response]) -> Callable[[Request], Response]:
        def endpoint(request: Request) -> Response:
            try:
                return page(request, _authenticate(self._context.registry, request))
            except _HttpError as http_error:
                return self._html("error.html", http_error.status, error=http_error)

        return endpoint

    def _home(self, request: Request, annotator: Annotator) -> Response:
        from starlette.responses import Response

        if not request.url.path.endswith("/"):
            return Response(status_code=307, headers={"location": f"{request.url.path}/"})
        return self._render("dashboard.html", annotator) if annotator.is_lead else self._labeling(annotator)

    def _adjudication(self, _: Request, annotator: Annotator) -> Response:
        if not annotator.is_lead:
            raise _HttpError(403, "only the lead can adjudicate")
        return self._labeling(annotator)

    def _labeling(self, annotator: Annotator) -> Response:
        history = self._context.assignments.labeled_pairs(annotator)[-MAX_HISTORY:]
        return self._render("annotate.html", annotator, history=history)

    def _render(self, template: str, annotator: Annotator, **variables: Any) -> Response:
        return self._html(
            template,
            title=self._context.title,
            annotator=annotator,
            csrf=self._context.registry.csrf_token(annotator),
            guidelines=self._guidelines,
            **variables,
        )

    def _html(self, template: str, status: int = 200, **variables: Any) -> Response:
        from starlette.responses import HTMLResponse

        return HTMLResponse(self._templates.get_template(template).render(**variables), status)


@dataclass(frozen=True, slots=True)
class _ApiRequest:
    annotator: Annotator
    query: Mapping[str, str]
    body: bytes


class _Api:
    """The JSON endpoints. Each handler takes a request and returns a JSON value."""

    def __init__(self, context: PageContext) -> None:
        self._assignments, self._registry = context.assignments, context.registry

    def routes(self, prefix: str) -> list[BaseRoute]:
        from starlette.routing import Route

        return [
            Route(f"{prefix}/api/next", self._endpoint(self._next_pairs)),
            Route(f"{prefix}/api/item", self._endpoint(self._get_pair)),
            Route(f"{prefix}/api/label", self._endpoint(self._submit_label), methods=["POST"]),
            Route(f"{prefix}/api/dashboard", self._endpoint(self._dashboard_data)),
        ]

    def _endpoint(self, handler: Callable[[_ApiRequest], Any]) -> Callable[[Request], Any]:
        from starlette.concurrency import run_in_threadpool
        from starlette.responses import Response

        def json_response(value: Any, status: int = 200) -> Response:
            return Response(orjson.dumps(value), status, media_type="application/json")

        async def endpoint(request: Request) -> Response:
            try:
                return json_response(await run_in_threadpool(handler, await self._authorize(request)))
            except _HttpError as http_error:
                return json_response({"error": http_error.message, "hint": http_error.hint}, http_error.status)
            except UsageError as error:
                return json_response({"error": error.message, "hint": error.hint}, 422)
            except RlaifError as error:
                return json_response({"error": str(error).partition("\n")[0], "hint": error.hint}, 503)

        return endpoint

    async def _authorize(self, request: Request) -> _ApiRequest:
        """Identify the annotator and, for a POST, check the CSRF token. Raises :class:`_HttpError`."""
        annotator = _authenticate(self._registry, request)
        if request.method != "POST":
            return _ApiRequest(annotator, request.query_params, b"")
        if not self._registry.is_valid_csrf_token(annotator, request.headers.get("x-csrf-token", "")):
            raise _HttpError(403, "this page is out of date", "Reload it: the links were replaced.")
        return _ApiRequest(annotator, request.query_params, await request.body())

    def _next_pairs(self, request: _ApiRequest) -> dict[str, Any]:
        query = request.query
        loaded = [pair for pair in query.get("loaded", "").split(",") if pair][: 4 * MAX_PAIRS_PER_REQUEST]
        requested = query.get("count", "")
        count = min(MAX_PAIRS_PER_REQUEST, int(requested)) if requested.isdecimal() else MAX_PAIRS_PER_REQUEST
        items = self._assignments.next_pairs(request.annotator, query.get("tab", ""), loaded, count)
        return {"items": items, "progress": self._assignments.progress(request.annotator)}

    def _get_pair(self, request: _ApiRequest) -> dict[str, Any]:
        return self._assignments.get_pair(request.annotator, request.query.get("id", ""))

    def _submit_label(self, request: _ApiRequest) -> dict[str, Any]:
        try:
            submission = LabelSubmission.model_validate_json(request.body)
        except ValidationError as error:
            raise UsageError(f"invalid label: {format_validation_error(error, LabelSubmission)}") from None
        result = self._assignments.submit_label(
            request.annotator,
            submission.id,
            submission.choice,
            comment=submission.comment,
            edited_response=submission.edited_response,
            confidence=submission.confidence,
            seconds=submission.seconds,
        )
        return {**result, "progress": self._assignments.progress(request.annotator)}

    def _dashboard_data(self, request: _ApiRequest) -> dict[str, Any]:
        if not request.annotator.is_lead:
            raise _HttpError(403, "only the lead can see the dashboard")
        return dashboard.dashboard_data(self._assignments, self._registry, time.time())


@contextlib.contextmanager
def bind_socket(host: str, port: int) -> Iterator[socket.socket]:
    """Yield a socket that listens on ``host`` and ``port`` (0 is a free one). Raises :class:`UsageError` on failure."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(128)
        except OSError as error:
            raise UsageError(
                f"cannot listen on {host} port {port}: {error.strerror or error}",
                hint="If the page is not open already, choose another port with --port N (0 for a free one).",
            ) from None
        yield listener


def serve(app: Starlette, listener: socket.socket) -> None:
    """Serve requests until interrupted. Labels are on disk when a request ends, so nothing is lost."""
    import uvicorn

    config = uvicorn.Config(
        app, lifespan="off", access_log=False, log_level="warning", server_header=False, date_header=False,
        timeout_graceful_shutdown=2,
    )  # fmt: skip
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listener])


def annotator_links(registry: AnnotatorRegistry, host: str, port: int) -> dict[str, str]:
    """Return the URL of every annotator by name, and last that of the lead."""
    display_host = f"[{host}]" if ":" in host else socket.getfqdn() if host == "0.0.0.0" else host  # noqa: S104
    base = f"http://{display_host}:{port}"
    if registry.without_links:
        return {registry.annotators[0].name: f"{base}/", registry.lead.name: f"{base}/lead/"}
    return {
        annotator.name: f"{base}/p/{registry.link_token(annotator)}/"
        for annotator in (*registry.annotators, registry.lead)
    }
