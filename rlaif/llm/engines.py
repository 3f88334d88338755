"""Where a client's model is served: at a URL that somebody else keeps, by a vLLM of ours here, or on a Ray cluster.

One model is served at a time, as one GPU has room for one; asking for another, or for the same with other settings,
stops the first.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlaif.config import ClientConfig, ClusterConfig
from rlaif.errors import UsageError
from rlaif.llm.budget import Meter
from rlaif.llm.client import Client
from rlaif.llm.cluster import Cluster
from rlaif.llm.endpoint import make_room
from rlaif.llm.replica import Model
from rlaif.llm.server import Say, Server


@dataclass(frozen=True, slots=True)
class Local:
    """A trained model by the name that its answers carry: a whole one at ``path``, or an adapter over ``base``."""

    name: str
    path: str
    base: str | None = None
    rank: int = 16
    """An adapter's rank, rounded up to one that vLLM has."""


class Engines:
    """Gives clients: for a URL that somebody else serves, or for a model that is served here or on a cluster, one model
    at a time."""

    def __init__(self, log: Path, config: ClientConfig, say: Say, cluster: ClusterConfig | None = None) -> None:
        self._log = log
        self._config = config
        self._say = say
        self._placed = cluster or ClusterConfig()
        self._cluster: Cluster | None = None
        self._server: Server | None = None
        self._local: dict[str, Local] = {}

    def know(self, local: Local) -> None:
        """From now on ``local.name`` is a model like any other; an adapter is served beside its base, by one server."""
        self._local[local.name] = local

    def _served(self, model: str, options: Mapping[str, Any]) -> tuple[str, Mapping[str, Any], str | None]:
        """The model that a server of ``model`` is started with, its options, and where it lies if not by its name."""
        local = self._local.get(model)
        base = local.base if local and local.base else model
        beside = [other for other in self._local.values() if other.base == base]
        if beside:
            adapters = {
                "enable_lora": True,
                "max_lora_rank": max(other.rank for other in beside),
                "lora_modules": [f"{other.name}={Path(other.path).resolve()}" for other in beside],
            }
            options = {**adapters, **options}
        return base, options, local.path if local and not local.base else None

    def __enter__(self) -> Engines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._server:
            self._server.close()
            self._server = None
        if self._cluster:
            self._cluster.close()
            self._cluster = None

    def client(self, model: str, base_url: Iterable[str], options: Mapping[str, Any], meter: Meter) -> Client:
        """A client for ``model``. Without ``base_url`` its server is started first. To be used in one event loop."""
        urls = list(base_url)
        if urls:
            refuse_settings(options)
            return Client(model, urls, self._config, meter)
        make_room(self._config.concurrency)  # before minutes go into the start of a server
        served, options, path = self._served(model, options)
        if self._placed.on == "ray":
            self._cluster = self._cluster or Cluster(self._placed, self._config, self._say, self._log)
            urls, key = self._cluster.alone(Model(served, options, path))
            # A replica that hangs ends itself, so that requests to it fail: here they are only lost after the deadline.
            patient = max(self._config.timeout_s, self._config.deadline_s)
            return Client(model, urls, self._config.model_copy(update={"timeout_s": patient}), meter, key=key)
        server = self._server
        changes = server.differences(options, path) if server and server.model == served else []
        if changes:
            self._say(f"restarting vLLM with {served}: {', '.join(changes)}")
        if server is None or server.model != served or changes:
            self.close()
            server = Server(served, options, self._config, self._log, self._say, path)
            self._server = server  # before it starts: an interrupt in the middle must find it
            server.start()
        else:
            server.ensure(silent_since=time.monotonic() if server.hangs() else None)

        async def revive(silent_since: float | None) -> None:
            given_up = threading.Event()
            try:
                await asyncio.to_thread(server.ensure, given_up, silent_since)
            finally:
                given_up.set()  # if cancelled: the end of the loop waits for the thread
            client.endpoints[0].url = server.url  # another program may have taken its port meanwhile

        client = Client(
            model, [server.url], self._config, meter, key=server.key, revive=revive, conditions=server.conditions
        )
        return client


def refuse_settings(options: Mapping[str, Any]) -> None:
    """Raises where there are any for a server that somebody else keeps."""
    if options:
        raise UsageError(
            "vllm settings are given for a server that rlaif does not start",
            mend="Take away either base_url or the [*.vllm] table.",
        )
