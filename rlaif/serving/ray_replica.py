"""The code of a model that runs on a Ray cluster: an application of Ray Serve whose replicas own one vLLM each.

:mod:`rlaif.serving.vllm_server` starts and cleans up vLLM inside the replica as it does elsewhere. Ray places the
replicas, scales their number and replaces dead ones. An application ends with the job that deployed it, even after
``kill -9``: each replica checks its owner's lease, an actor that Ray ends with that job. A detached application has no
lease and stays.

``ray.serve.llm`` is not used: it pins another vLLM and CUDA wheels, and serves no adapters from local paths.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import math
import os
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlaif.config.models import ClientConfig, ClusterConfig
from rlaif.records import content_key
from rlaif.serving.precision import PARALLELISM_OPTIONS
from rlaif.serving.time_limits import METRICS_PATH, Patience, parse_metrics
from rlaif.serving.vllm_server import VllmServer

if TYPE_CHECKING:
    import aiohttp
    from ray.serve import Application
    from starlette.requests import Request
    from starlette.responses import Response

NAMESPACE = "rlaif"
HEALTH_CHECK_PERIOD_S = 5.0
MAX_REQUESTS_IN_FLIGHT = 256
"""Requests that one replica gets at a time: the default number of requests that vLLM runs together."""
METRICS_INTERVAL_S = 5.0
"""Interval of reading vLLM's metrics while it has requests."""
DRAIN_TIMEOUT_S = 120.0
"""How long a replica that is being removed may finish its requests."""


@dataclass(frozen=True)
class ServedModel:
    """A model to serve."""

    name: str
    """The model's name in requests."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """vLLM's settings."""
    path: str | None = None
    """The model's folder, if it differs from the name."""

    def int_option(self, name: str, default: int) -> int:
        """Return an option as an integer, by its name with underscores."""
        return int(next((value for key, value in self.options.items() if key.replace("-", "_") == name), default))

    @property
    def gpus(self) -> int:
        """Number of GPUs that one vLLM uses."""
        return math.prod(self.int_option(name, 1) for name in PARALLELISM_OPTIONS)

    @property
    def application_name(self) -> str:
        """The name on the cluster and in the URL, which is the same for the same settings."""
        slug = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")[-40:]
        return f"{slug}-{content_key(name=self.name, options=dict(self.options), path=self.path)[:8]}"


class VllmReplica:
    """One copy of a model in a Ray process: starts a vLLM and forwards requests to it."""

    def __init__(
        self,
        model: Mapping[str, Any],
        client: Mapping[str, Any],
        key: str | None = None,
        log_dir: str | None = None,
        lease: str | None = None,
    ) -> None:
        from ray import serve

        context = serve.get_replica_context()
        self._application, self._key, self._lease = context.app_name, key, lease
        self._session: aiohttp.ClientSession | None = None
        self._stopping = False
        self._patience = Patience(ClientConfig(**client).timeout_s, None)
        self._metrics_task: asyncio.Task[None] | None = None
        base_dir = Path(log_dir) if log_dir else _ray_log_dir()
        folder = base_dir / f"ray-{context.app_name}-{context.replica_id.unique_id}"
        self._server = VllmServer(
            model["name"], model["options"], ClientConfig(**client), folder, _log, model["path"], model["cores"]
        )
        self._server.start()
        threading.Thread(target=self._exit_with_server, daemon=True).start()

    def _exit_with_server(self) -> None:
        self._server.wait()
        if not self._stopping:
            os._exit(1)  # at once, so that Ray sends no more requests here and starts another replica

    async def __call__(self, request: Request) -> Response:
        import aiohttp
        from starlette.responses import JSONResponse, Response

        authorization = request.headers.get("authorization", "")
        if self._key and not hmac.compare_digest(authorization.encode(), f"Bearer {self._key}".encode()):
            return JSONResponse({"error": {"message": "the API key is wrong or missing"}}, 401)
        if self._session is None:  # needs a running loop
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(total=None),
                headers={"Authorization": f"Bearer {self._server.key}"},
            )
            self._metrics_task = asyncio.create_task(self._poll_metrics())
        path = request.url.path.removeprefix(request.scope.get("root_path", ""))
        if path == METRICS_PATH:  # another replica may answer the next reading, so they would not show progress
            return JSONResponse({"error": {"message": "each replica has its own metrics"}}, 404)
        url = self._server.url.removesuffix("/v1") + path
        headers = {"Content-Type": request.headers.get("content-type", "application/json")}
        sent_at = time.monotonic()
        # A vLLM that hangs still lists its models: only requests for answers count.
        with self._patience.track_request() if request.method == "POST" else contextlib.nullcontext():
            try:
                async with self._session.request(
                    request.method, url, data=await request.body(), headers=headers
                ) as response:
                    content = await response.read()
            except asyncio.CancelledError:  # the client gave up: its time limit began slightly before the one here
                self._exit_if_hung(0.9)
                raise
        if request.method == "POST":
            self._patience.record_answer(sent_at, 0)
        return Response(content, response.status, media_type=response.content_type)

    async def _poll_metrics(self) -> None:
        """Read vLLM's metrics while it has requests."""
        from aiohttp import ClientError

        assert self._session is not None
        interval = min(METRICS_INTERVAL_S, self._patience.timeout_s / 4)
        while True:
            await asyncio.sleep(interval)
            if not self._patience.in_flight:
                continue
            with contextlib.suppress(OSError, TimeoutError, ClientError):
                async with asyncio.timeout(interval):
                    async with self._session.get(self._server.url.removesuffix("/v1") + METRICS_PATH) as response:
                        load = parse_metrics(await response.text())
                if load:
                    self._patience.record_load(load)
            self._exit_if_hung()

    def _exit_if_hung(self, fraction: float = 1.0) -> None:
        """End this replica if requests have waited for ``fraction`` of ``timeout_s`` without progress."""
        if self._patience.stalled_s() >= fraction * self._patience.timeout_s:
            os._exit(1)  # Ray starts another replica

    async def check_health(self) -> None:
        """Raise RuntimeError if the engine is dead, and end the application if its owner is gone. Called by Ray."""
        if self._lease and not await asyncio.to_thread(_is_lease_held, self._lease):
            from ray import serve

            serve.delete(self._application, _blocking=False)
        if not await asyncio.to_thread(self._server.is_healthy):
            raise RuntimeError("vLLM is dead")

    def __del__(self) -> None:
        self._stopping = True
        with contextlib.suppress(AttributeError):  # the constructor failed early
            self._server.stop()


class OwnerLease:
    """Actor that lives as long as the job of the process that created it."""


def _is_lease_held(lease: str) -> bool:
    import ray

    try:
        ray.get_actor(lease, namespace=NAMESPACE)
    except ValueError:
        return False
    return True


def _ray_log_dir() -> Path:
    """Return the folder of Ray's logs on this node, which its dashboard shows."""
    from ray._private import worker

    return Path(worker._global_node.get_logs_dir_path())


def _log(line: str) -> None:
    import logging

    logging.getLogger("ray.serve").info(line)


def app(settings: Mapping[str, Any]) -> Application:
    """Build the application for a Serve configuration file (``import_path: rlaif.serving.ray_replica:app``).

    ``settings``: ``model``, ``path``, ``vllm`` (a table), ``gpus`` per vLLM if they do not follow from that, and fields
    of ``[cluster]`` and ``[client]`` by name. Requests must carry the key in RLAIF_API_KEY of the cluster.
    """
    remaining = dict(settings)
    model = ServedModel(remaining.pop("model"), remaining.pop("vllm", {}), remaining.pop("path", None))
    gpus = remaining.pop("gpus", model.gpus)
    client = {name: remaining.pop(name) for name in list(remaining) if name in ClientConfig.model_fields}
    key = os.environ.get("RLAIF_API_KEY") or None
    return build_application(model, ClusterConfig(**remaining), ClientConfig(**client), gpus, key=key)


def build_application(
    model: ServedModel,
    config: ClusterConfig,
    client: ClientConfig,
    gpus: float,
    *,
    replicas: int = 1,
    **replica_options: str | None,
) -> Application:
    """Build the application that serves ``model`` with vLLMs of ``gpus`` GPUs each.

    It has ``config.replicas`` replicas, by default ``replicas``. With ``config.max_replicas``, their number follows the
    load. ``replica_options``: ``key``, ``log_dir`` and ``lease`` of :class:`VllmReplica`.
    """
    from ray import serve

    scaling: dict[str, Any] = {"num_replicas": config.replicas or replicas}
    if config.max_replicas:
        # A run at full concurrency keeps all replicas busy, and no request waits for a full one.
        target_requests = min(
            model.int_option("max_num_seqs", MAX_REQUESTS_IN_FLIGHT) // 2, client.concurrency // config.max_replicas
        )
        bounds = {"min_replicas": config.replicas or 1, "max_replicas": config.max_replicas}
        scaling = {"autoscaling_config": {**bounds, "target_ongoing_requests": max(1, target_requests)}}
    deployment = serve.deployment(VllmReplica).options(
        name="vllm",
        ray_actor_options={"num_cpus": config.cpus, "num_gpus": gpus},
        max_ongoing_requests=MAX_REQUESTS_IN_FLIGHT,
        graceful_shutdown_timeout_s=min(client.timeout_s, DRAIN_TIMEOUT_S),
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        max_constructor_retry_count=2,  # the replica itself retries what may succeed later
        **scaling,
    )
    model_settings = {
        "name": model.name,
        "options": dict(model.options),
        "path": model.path,
        "cores": max(1, int(config.cpus)),
    }
    settings = client.model_dump(include={"server_python", "server_start_timeout_s", "timeout_s"}, exclude_none=True)
    application: Application = deployment.bind(model_settings, settings, **replica_options)
    return application
