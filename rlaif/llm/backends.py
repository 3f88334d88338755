"""Backends of models: a URL that someone else serves, a vLLM on this machine, or a Ray cluster.

One model is served at a time, as one GPU has room for one. A request for another model, or for the same model with
other settings, stops the first.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlaif.config.models import ClientConfig, ClusterConfig
from rlaif.errors import UsageError
from rlaif.llm.client import Client
from rlaif.llm.endpoint import raise_open_file_limit
from rlaif.llm.usage import UsageMeter
from rlaif.serving.ray_cluster import RayCluster
from rlaif.serving.ray_replica import ServedModel
from rlaif.serving.vllm_server import Log, VllmServer


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A trained model: complete weights at ``path``, or an adapter of ``base``."""

    name: str
    """The model's name in requests and records."""
    path: str
    base: str | None = None
    rank: int = 16
    """The adapter's rank, rounded up to one that vLLM supports."""


class ModelBackends:
    """Creates clients, and serves models here or on a cluster, one model at a time."""

    def __init__(self, log_dir: Path, config: ClientConfig, log: Log, cluster: ClusterConfig | None = None) -> None:
        self._log_dir = log_dir
        self._config = config
        self._log = log
        self._cluster_config = cluster or ClusterConfig()
        self._cluster: RayCluster | None = None
        self._server: VllmServer | None = None
        self._local_models: dict[str, LocalModel] = {}

    def register_local_model(self, local_model: LocalModel) -> None:
        """Make ``local_model.name`` usable like any other model. One server serves an adapter and its base."""
        self._local_models[local_model.name] = local_model

    def _resolve_served_model(
        self, model: str, options: Mapping[str, Any]
    ) -> tuple[str, Mapping[str, Any], str | None]:
        """Return the model to start a server with, its options, and its path if that differs from its name."""
        local_model = self._local_models.get(model)
        base = local_model.base if local_model and local_model.base else model
        lora_models = [candidate for candidate in self._local_models.values() if candidate.base == base]
        if lora_models:
            lora_options = {
                "enable_lora": True,
                "max_lora_rank": max(lora.rank for lora in lora_models),
                "lora_modules": [f"{lora.name}={Path(lora.path).resolve()}" for lora in lora_models],
            }
            options = {**lora_options, **options}
        return base, options, local_model.path if local_model and not local_model.base else None

    def __enter__(self) -> ModelBackends:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the server and take down what is served on the cluster."""
        if self._server:
            self._server.close()
            self._server = None
        if self._cluster:
            self._cluster.close()
            self._cluster = None

    def client_for(self, model: str, base_url: Iterable[str], options: Mapping[str, Any], usage: UsageMeter) -> Client:
        """Return a client for ``model``, for use in one event loop. Without ``base_url``, start a server first."""
        urls = list(base_url)
        if urls:
            reject_vllm_settings(options)
            return Client(model, urls, self._config, usage)
        raise_open_file_limit(self._config.concurrency)  # before minutes go into the start of a server
        served_model, options, path = self._resolve_served_model(model, options)
        if self._cluster_config.backend == "ray":
            return self._cluster_client(model, ServedModel(served_model, options, path), usage)
        server = self._ensure_server(served_model, options, path)

        async def restart_server(silent_since: float | None) -> None:
            cancelled = threading.Event()
            try:
                await asyncio.to_thread(server.ensure_running, cancelled, silent_since)
            finally:
                cancelled.set()  # if this task is cancelled, the end of the loop waits for the thread
            client.endpoints[0].url = server.url  # another program may have taken its port meanwhile

        client = Client(
            model,
            [server.url],
            self._config,
            usage,
            key=server.key,
            restart_server=restart_server,
            describe_server=server.cpu_conditions,
        )
        return client

    def _cluster_client(self, model: str, served_model: ServedModel, usage: UsageMeter) -> Client:
        self._cluster = self._cluster or RayCluster(self._cluster_config, self._config, self._log, self._log_dir)
        urls, key = self._cluster.serve_exclusively(served_model)
        # A replica that hangs ends itself, which fails its requests. On this side, only the deadline ends a request.
        timeout_s = max(self._config.timeout_s, self._config.request_deadline_s)
        return Client(model, urls, self._config.model_copy(update={"timeout_s": timeout_s}), usage, key=key)

    def _ensure_server(self, served_model: str, options: Mapping[str, Any], path: str | None) -> VllmServer:
        """Return the running server if its command line fits; otherwise replace it."""
        server = self._server
        changes = server.required_changes(options, path) if server and server.model == served_model else []
        if changes:
            self._log(f"restarting vLLM with {served_model}: {', '.join(changes)}")
        if server is None or server.model != served_model or changes:
            self.close()
            server = VllmServer(served_model, options, self._config, self._log_dir, self._log, path)
            self._server = server  # before it starts, so that an interrupt finds it
            server.start()
        else:
            server.ensure_running(silent_since=time.monotonic() if server.is_hung() else None)
        return server


def reject_vllm_settings(options: Mapping[str, Any]) -> None:
    """Raise :class:`UsageError` if there are vLLM options for a server that rlaif does not start."""
    if options:
        raise UsageError(
            "vLLM settings apply only to a server that rlaif starts, but `base_url` is set",
            hint="Remove either `base_url` or the `[*.vllm]` table.",
        )
