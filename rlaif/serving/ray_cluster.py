"""A Ray cluster as this process uses it: deploys models, finds running ones, and takes them down.

The cluster is the one that ``RAY_ADDRESS`` names or that runs on this machine. Without one, rlaif starts a local
cluster, which ends with this process. For all other modules a model on Ray is a URL like any other, so journal, budget
and retries do not depend on it. The code that runs on the cluster is in :mod:`rlaif.serving.ray_replica`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import re
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rlaif import spawn
from rlaif.config.models import ClientConfig, ClusterConfig
from rlaif.errors import MissingDependencyError, ServerError, UsageError, os_error_message
from rlaif.serving.ports import LOOPBACK, free_port
from rlaif.serving.ray_replica import NAMESPACE, OwnerLease, ServedModel, build_application

NOT_DEPLOYED = "gone"
SERVE_PORT = 8000
"""Ray Serve's default port."""
CONNECT_TIMEOUT_S = 10.0
POLL_INTERVAL_S = 1.0
LOG_INTERVAL_S = 20.0
STOP_TIMEOUT_S = 20.0
"""How long to wait while applications end. Ray ends them in any case."""
OBJECT_STORE_BYTES = 100 * 2**20
"""Size of a local cluster's object store, which rlaif does not use."""

ALL_INTERFACES = "0.0.0.0"  # noqa: S104
STARTING_STATUSES = ("NOT_STARTED", "DEPLOYING")
ADDRESS_HINT = "Start the cluster or fix `RAY_ADDRESS`."
Log = Callable[[str], None]


def require_ray() -> None:
    """Raise :class:`MissingDependencyError` if Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise MissingDependencyError("Ray is not installed", extra="cluster")


class RayCluster:
    """Connects to a cluster, or starts a local one, at first use. ``log_dir``: logs of the vLLMs of a local cluster."""

    def __init__(self, config: ClusterConfig, client: ClientConfig, log: Log, log_dir: Path | None = None) -> None:
        self._config, self._client, self._log, self._log_dir = config, client, log, log_dir
        self.started_here = False
        """True if this process started the cluster and ends it."""
        self._connected = self._was_initialized = False
        self._lease_name: Any = None
        self._deployed: list[str] = []
        self._exclusive_app: tuple[str, str, str] | None = None

    def connect(self, port: int | None = None, *, start: bool = True) -> None:
        """Connect, or start a local cluster if ``start`` is True. Starts Serve on ``port`` if it does not run yet.

        Raises :class:`MissingDependencyError`, or :class:`ServerError` if no cluster answers.
        """
        if self._connected:
            return
        require_ray()
        if (Path.home() / ".ray" / "auth_token").exists():
            # A cluster of this user requires the token, and Ray sends it only in this mode.
            os.environ.setdefault("RAY_AUTH_MODE", "token")
        with _preserve_signal_handlers():
            import ray
            from ray import serve

            self._was_initialized = ray.is_initialized()  # by a notebook
            if not self._was_initialized:
                self._init_ray(start)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        self._connected = True
        # Reachable from other machines, as every replica requires a key.
        host = LOOPBACK if self.started_here else ALL_INTERFACES
        options = {"host": host, "port": port or (free_port() if self.started_here else SERVE_PORT)}
        serve.start(http_options=options, logging_config={"log_level": "ERROR"})

    def _init_ray(self, start: bool) -> None:
        import ray

        common = {"logging_level": logging.ERROR, "log_to_driver": False, "namespace": NAMESPACE}
        address = os.environ.get("RAY_ADDRESS") or None
        try:
            if address == "local":
                raise ConnectionError("a local cluster is requested")
            _check_port_open(address or "")
            ray.init(address="auto", **common)
        except ConnectionError as error:
            if address not in (None, "local") or not start:
                message = " ".join(str(error).split())[:200]
                raise ServerError(
                    f"the Ray cluster is unreachable: {message}", location=address, hint=ADDRESS_HINT
                ) from None
            self._log("starting a local Ray cluster (takes about 10 s)")
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            with spawn.without_excluded_variables():
                ray.init(address="local", include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **common)
            self.started_here = True

    @property
    def is_local_only(self) -> bool:
        """True if only this machine can reach the served models."""
        return _http_address()[0] in (LOOPBACK, "localhost", "::1")

    def serve_exclusively(self, model: ServedModel) -> tuple[list[str], str | None]:
        """Serve ``model`` as this process's only model, wait for it, and return its URLs and their key.

        If ``rlaif serve`` already serves the model with these settings, that application is used, and the returned key
        is None: clients use the key from the environment.
        """
        self.connect()
        name = model.application_name
        if self._exclusive_app and self._exclusive_app[0] == name and _running_application(self._exclusive_app[1]):
            return self.base_urls(self._exclusive_app[1]), self._exclusive_app[2]
        if _running_application(name):
            self._log(f"{model.name} is already served on the cluster as {name}")
            self.wait(model, name)
            return self.base_urls(name), None
        self.stop()
        unique_name, key = f"{name}-{secrets.token_hex(2)}", secrets.token_hex(16)
        self.deploy(model, unique_name, key)
        self.wait(model, unique_name)
        self._exclusive_app = name, unique_name, key
        return self.base_urls(unique_name), key

    def deploy(
        self, model: ServedModel, name: str, key: str | None, *, num_shares: int = 1, detached: bool = False
    ) -> None:
        """Begin to serve ``model`` as ``name``, and return at once.

        Without configured replicas it uses one of ``num_shares`` equal shares of the cluster's GPUs. ``detached``: it
        outlives this process. Raises :class:`UsageError` if a local cluster is too small.
        """
        import ray
        from ray import serve

        resources, config = ray.cluster_resources(), self._config
        gpus = model.gpus if resources.get("GPU") else 0
        max_fitting = max(1, int(resources["GPU"]) // num_shares // gpus) if gpus else 1
        min_replicas = config.replicas or (1 if config.max_replicas else max_fitting)
        if self.started_here:
            self._require_resources(model, min_replicas, gpus, resources)
        if not detached and self._lease_name is None:
            self._lease_name = f"lease-{secrets.token_hex(8)}"
            self._lease = (
                ray.remote(OwnerLease).options(name=self._lease_name, namespace=NAMESPACE, num_cpus=0).remote()
            )
        log_dir = str(self._log_dir.resolve()) if self._log_dir and self.started_here else None
        lease = None if detached else self._lease_name
        application = build_application(
            model, config, self._client, gpus, replicas=min_replicas, key=key, log_dir=log_dir, lease=lease
        )
        replica_range = f"{min_replicas} to {config.max_replicas}" if config.max_replicas else f"{min_replicas}"
        size = f"{gpus} GPU(s)" if gpus else f"{config.cpus:g} CPU(s)"
        self._log(f"serving {model.name} on Ray: {replica_range} x vLLM, each with {size}")
        self._deployed.append(name)
        target = serve.RunTarget(application, name=name, route_prefix=f"/{name}")
        serve.run_many([target], wait_for_applications_running=False)

    def _require_resources(
        self, model: ServedModel, num_replicas: int, gpus: int, resources: Mapping[str, float]
    ) -> None:
        for kind, per_replica, setting in (("CPU", self._config.cpus, "cpus"), ("GPU", gpus, "tensor_parallel_size")):
            needed, available = per_replica * num_replicas, resources.get(kind, 0)
            if needed > available:
                raise UsageError(
                    f"{num_replicas} x {model.name} needs {needed:g} {kind}s, but the cluster has {available:g}",
                    hint=f"Lower `replicas` or `{setting}`, or set `RAY_ADDRESS` to a larger cluster.",
                )

    def wait(self, model: ServedModel, name: str) -> None:
        """Wait until every requested replica runs. Raises :class:`ServerError` with Ray's message."""
        began = last_logged = time.monotonic()
        while True:
            application, waited = _running_application(name), time.monotonic() - began
            if application and application.status == "RUNNING":
                self._log(f"{model.name} is ready after {waited:.0f} s")
                return
            deployments = application.deployments.values() if application else ()
            error = _error_from_log(" ".join(deployment.message for deployment in deployments))
            is_starting = application and application.status in STARTING_STATUSES
            if not is_starting or waited > self._client.server_start_timeout_s:
                reason = error or (application and application.message) or "the application was taken down"
                raise ServerError(
                    f"Ray could not serve {model.name}: {reason}",
                    hint="See `serve status` and Ray's logs, then rerun the same command.",
                )
            if time.monotonic() - last_logged >= LOG_INTERVAL_S:
                last_logged = time.monotonic()
                self._log(f"{model.name}: {describe_replicas(name)} ({waited:.0f} s){': ' if error else ''}{error}")
            time.sleep(POLL_INTERVAL_S)

    def base_urls(self, name: str) -> list[str]:
        """Return the application's base URLs: one, or one per node if other machines can reach the cluster."""
        import ray
        from ray import serve

        host, port = _http_address()
        hosts = [host]
        if host == ALL_INTERFACES:
            addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
            healthy = (node for node, state in serve.status().proxies.items() if state == "HEALTHY")
            hosts = sorted(addresses[node] for node in healthy if node in addresses)
        return [f"http://{f'[{address}]' if ':' in address else address}:{port}/{name}/v1" for address in hosts]

    def stop(self, name: str | None = None) -> bool:
        """Take down the applications of this process, or the one called ``name``, whichever process deployed it.

        Returns True if one was running.
        """
        from ray import serve

        names = [name] if name else self._deployed
        running = [app_name for app_name in names if _running_application(app_name)]
        for app_name in running:
            serve.delete(app_name, _blocking=False)
        self._deployed = [app_name for app_name in self._deployed if app_name not in names]
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while set(running) & set(serve.status().applications) and time.monotonic() < deadline:
            time.sleep(0.2)
        return bool(running)

    def detach(self) -> None:
        """Let the deployed applications outlive this process."""
        self._deployed.clear()

    def close(self) -> None:
        """Take down the applications of this process, and its cluster if this process started it."""
        if not self._connected:
            return
        import ray

        with _preserve_signal_handlers():
            try:
                self.stop()
            finally:
                self._connected = False
                if not self._was_initialized:
                    ray.shutdown()


def describe_replicas(name: str) -> str:
    """Describe the states of an application's replicas; :data:`NOT_DEPLOYED` if it does not run."""
    application = _running_application(name)
    if not application:
        return NOT_DEPLOYED
    counts = [
        f"{count} {str(getattr(state, 'value', state)).lower()}"
        for deployment in application.deployments.values()
        for state, count in deployment.replica_states.items()
        if count
    ]
    return f"replicas: {', '.join(sorted(counts)) or 'none'}"


def _check_port_open(address: str) -> None:
    """Raise ConnectionError if no server listens at ``HOST:PORT``, which Ray takes minutes to report."""
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        if parts.hostname and parts.port:
            socket.create_connection((parts.hostname, parts.port), CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        raise ConnectionError(os_error_message(error) if isinstance(error, OSError) else str(error)) from None


def _running_application(name: str) -> Any:
    """Return Serve's status of an application, or None if it does not run."""
    from ray import serve

    application = serve.status().applications.get(name)
    return None if application is None or application.status == "DELETING" else application


def _error_from_log(message: str) -> str:
    """Return the last error in a message of Ray, without its traceback; "" if there is none."""
    errors = re.findall(r"^\s*(?:[\w.]*\.)?\w*Error: (.+)$", message, re.MULTILINE)
    return " ".join(errors[-1].split())[:400] if errors else ""


def _http_address() -> tuple[str, int]:
    from ray.serve.context import _get_global_client

    client: Any = _get_global_client()
    return client.http_config.host, client.http_config.port


@contextlib.contextmanager
def _preserve_signal_handlers() -> Iterator[None]:
    """Restore the signal handlers that Ray replaces by its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {signal_number: signal.getsignal(signal_number) for signal_number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for signal_number, handler in handlers.items():
            signal.signal(signal_number, handler)
