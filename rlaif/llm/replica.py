"""What of a model runs on a Ray cluster: an application of Ray Serve whose replicas own one vLLM each.

What a vLLM is started with and that nothing of it is left behind are :mod:`rlaif.llm.server`'s, which works inside the
replica as it does elsewhere. Where replicas run, how many there are and that a dead one is replaced are Ray's. An
application ends with the job that deployed it, kill -9 included: each replica looks for its owner's leash, an actor
that Ray ends with that job. One that was detached has none and stays.

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

from rlaif.config import ClientConfig, ClusterConfig
from rlaif.llm.endpoint import METRICS
from rlaif.llm.patience import Patience, parse_metrics
from rlaif.llm.precision import PARALLEL
from rlaif.llm.server import Server
from rlaif.records import key_of

if TYPE_CHECKING:
    import aiohttp
    from ray.serve import Application
    from starlette.requests import Request
    from starlette.responses import Response

NAMESPACE = "rlaif"
HEALTH_EVERY_S = 5.0
MOST_IN_FLIGHT = 256
"""Requests that one replica is given at a time: as many as a vLLM runs together unless told otherwise."""
WATCH_EVERY_S = 5.0
"""How often vLLM's metrics are read while it has requests."""
DRAIN_S = 120.0
"""How long a replica that is to go may finish what it has."""


@dataclass(frozen=True)
class Model:
    """What is served: ``name`` to clients, from ``path`` where that is not its name, with vLLM's own ``options``."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    path: str | None = None

    def option(self, name: str, default: int) -> int:
        return int(next((value for key, value in self.options.items() if key.replace("-", "_") == name), default))

    @property
    def gpus(self) -> int:
        """How many one vLLM takes."""
        return math.prod(self.option(name, 1) for name in PARALLEL)

    @property
    def application(self) -> str:
        """Its name on the cluster, and in its URL: the same for the same settings."""
        slug = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")[-40:]
        return f"{slug}-{key_of(name=self.name, options=dict(self.options), path=self.path)[:8]}"


class Replica:
    """One copy of a model, in a process of Ray's: starts a vLLM beside itself and passes requests on to it."""

    def __init__(
        self,
        model: Mapping[str, Any],
        client: Mapping[str, Any],
        key: str | None = None,
        log: str | None = None,
        leash: str | None = None,
    ) -> None:
        from ray import serve

        here = serve.get_replica_context()
        self._application, self._key, self._leash = here.app_name, key, leash
        self._session: aiohttp.ClientSession | None = None
        self._ending = False
        self._patience = Patience(ClientConfig(**client).timeout_s, None)
        self._watching: asyncio.Task[None] | None = None
        folder = (Path(log) if log else _logs()) / f"ray-{here.app_name}-{here.replica_id.unique_id}"
        self._server = Server(
            model["name"], model["options"], ClientConfig(**client), folder, _note, model["path"], model["cores"]
        )
        self._server.start()
        threading.Thread(target=self._die_with_server, daemon=True).start()

    def _die_with_server(self) -> None:
        self._server.wait()
        if not self._ending:
            os._exit(1)  # at once, so that Ray sends nothing more here and starts another

    async def __call__(self, request: Request) -> Response:
        import aiohttp
        from starlette.responses import JSONResponse, Response

        given = request.headers.get("authorization", "")
        if self._key and not hmac.compare_digest(given.encode(), f"Bearer {self._key}".encode()):
            return JSONResponse({"error": {"message": "bad or missing key"}}, 401)
        if self._session is None:  # it wants a running loop
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(total=None),
                headers={"Authorization": f"Bearer {self._server.key}"},
            )
            self._watching = asyncio.create_task(self._watch())
        path = request.url.path.removeprefix(request.scope.get("root_path", ""))
        if path == METRICS:  # another replica may answer the next reading, so they show no progress
            return JSONResponse({"error": {"message": "each replica has metrics of its own"}}, 404)
        url = self._server.url.removesuffix("/v1") + path
        headers = {"Content-Type": request.headers.get("content-type", "application/json")}
        sent = time.monotonic()
        # A vLLM that hangs still lists its models: only requests for answers count.
        with self._patience.waiting() if request.method == "POST" else contextlib.nullcontext():
            try:
                async with self._session.request(
                    request.method, url, data=await request.body(), headers=headers
                ) as reply:
                    read = await reply.read()
            except asyncio.CancelledError:  # the client has given up: its limit began a little before ours
                self._end_if_hung(0.9)
                raise
        if request.method == "POST":
            self._patience.answered(sent, 0)
        return Response(read, reply.status, media_type=reply.content_type)

    async def _watch(self) -> None:
        """Read vLLM's metrics while it has requests."""
        from aiohttp import ClientError

        assert self._session is not None
        interval = min(WATCH_EVERY_S, self._patience.timeout_s / 4)
        while True:
            await asyncio.sleep(interval)
            if not self._patience.in_flight:
                continue
            with contextlib.suppress(OSError, TimeoutError, ClientError):
                async with asyncio.timeout(interval):
                    async with self._session.get(self._server.url.removesuffix("/v1") + METRICS) as reply:
                        load = parse_metrics(await reply.text())
                if load:
                    self._patience.observe(load)
            self._end_if_hung()

    def _end_if_hung(self, part: float = 1.0) -> None:
        """End this replica if requests have waited for ``part`` of ``timeout_s`` without a token or an answer."""
        if self._patience.stalled_s() >= part * self._patience.timeout_s:
            os._exit(1)  # Ray starts another one

    async def check_health(self) -> None:
        """Called by Ray. Raises where the engine is dead; ends the application where its owner is gone."""
        if self._leash and not await asyncio.to_thread(_is_held, self._leash):
            from ray import serve

            serve.delete(self._application, _blocking=False)
        if not await asyncio.to_thread(self._server.healthy):
            raise RuntimeError("vLLM is dead")

    def __del__(self) -> None:
        self._ending = True
        with contextlib.suppress(AttributeError):  # it did not get so far
            self._server.stop()


class Leash:
    """Lives as long as the job of the process that made it."""


def _is_held(leash: str) -> bool:
    import ray

    try:
        ray.get_actor(leash, namespace=NAMESPACE)
    except ValueError:
        return False
    return True


def _logs() -> Path:
    """Where Ray keeps the logs of this node, which its dashboard shows."""
    from ray._private import worker

    return Path(worker._global_node.get_logs_dir_path())


def _note(line: str) -> None:
    import logging

    logging.getLogger("ray.serve").info(line)


def app(settings: Mapping[str, Any]) -> Application:
    """The application for a Serve configuration file (``import_path: rlaif.llm.replica:app``).

    ``settings``: ``model``, ``path``, ``vllm`` (a table), ``gpus`` for each vLLM where they do not follow from that,
    and fields of ``[cluster]`` and ``[client]`` by name. The key that requests must carry is RLAIF_API_KEY there.
    """
    given = dict(settings)
    model = Model(given.pop("model"), given.pop("vllm", {}), given.pop("path", None))
    gpus = given.pop("gpus", model.gpus)
    client = {name: given.pop(name) for name in list(given) if name in ClientConfig.model_fields}
    key = os.environ.get("RLAIF_API_KEY") or None
    return build(model, ClusterConfig(**given), ClientConfig(**client), gpus, key=key)


def build(
    model: Model, config: ClusterConfig, client: ClientConfig, gpus: float, *, replicas: int = 1, **how: str | None
) -> Application:
    """The application that serves ``model``: ``config.replicas`` (else ``replicas``) vLLMs of ``gpus`` GPUs each, or
    from so many up to ``config.max_replicas`` by load. ``how``: ``key``, ``log`` and ``leash`` of :class:`Replica`."""
    from ray import serve

    scale: dict[str, Any] = {"num_replicas": config.replicas or replicas}
    if config.max_replicas:
        # A run at full concurrency has work for all of them, and none waits for a replica that is full.
        each = min(model.option("max_num_seqs", MOST_IN_FLIGHT) // 2, client.concurrency // config.max_replicas)
        bounds = {"min_replicas": config.replicas or 1, "max_replicas": config.max_replicas}
        scale = {"autoscaling_config": {**bounds, "target_ongoing_requests": max(1, each)}}
    deployment = serve.deployment(Replica).options(
        name="vllm",
        ray_actor_options={"num_cpus": config.cpus, "num_gpus": gpus},
        max_ongoing_requests=MOST_IN_FLIGHT,
        graceful_shutdown_timeout_s=min(client.timeout_s, DRAIN_S),
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=HEALTH_EVERY_S,
        max_constructor_retry_count=2,  # what may pass is tried again inside
        **scale,
    )
    what = {"name": model.name, "options": dict(model.options), "path": model.path, "cores": max(1, int(config.cpus))}
    settings = client.model_dump(include={"server_python", "server_start_s", "timeout_s"}, exclude_none=True)
    built: Application = deployment.bind(what, settings, **how)
    return built
