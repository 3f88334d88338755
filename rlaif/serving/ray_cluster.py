"""A Ray cluster as this process uses it: models are deployed there, found there, and taken down again.

The cluster is the one that ``RAY_ADDRESS`` names or that runs on this machine; where there is none, a local one is
started, and ends with us. To everybody else a model on Ray is a URL like any other, so journal, budget and retries know
nothing of it. What runs on the cluster is :mod:`rlaif.serving.ray_replica`.
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
from collections.abc import Callable, Iterator
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
"""Ray Serve's own."""
CONNECT_TIMEOUT_S = 10.0
POLL_INTERVAL_S = 1.0
LOG_INTERVAL_S = 20.0
STOP_TIMEOUT_S = 20.0
"""How long to look on while applications end. Ray ends them all the same."""
OBJECT_STORE_BYTES = 100 * 2**20
"""Of a local cluster's object store, which nothing of ours goes through."""

ALL_INTERFACES = "0.0.0.0"  # noqa: S104
STARTING_STATUSES = ("NOT_STARTED", "DEPLOYING")
ADDRESS_HINT = "Start it, or mend RAY_ADDRESS."
Log = Callable[[str], None]


def require_ray() -> None:
    """Raises :class:`MissingDependencyError`."""
    if importlib.util.find_spec("ray") is None:
        raise MissingDependencyError("Ray is not installed", extra="cluster")


class RayCluster:
    """Connects (or starts) when it is first needed. ``log_dir``: where the vLLMs of a local cluster write."""

    def __init__(self, config: ClusterConfig, client: ClientConfig, log: Log, log_dir: Path | None = None) -> None:
        self._config, self._client, self._log, self._log_dir = config, client, log, log_dir
        self.started_here = False
        """Whether the cluster was started here, and ends here."""
        self._connected = self._was_initialized = False
        self._lease_name: Any = None
        self._deployed: list[str] = []
        self._exclusive_app: tuple[str, str, str] | None = None

    def connect(self, port: int | None = None, *, start: bool = True) -> None:
        """Connect, or start a local one (unless told not to), with Serve on ``port`` where it does not run yet.

        Raises :class:`MissingDependencyError` or :class:`ServerError`.
        """
        if self._connected:
            return
        require_ray()
        if (Path.home() / ".ray" / "auth_token").exists():
            # A cluster of this user's asks for the token, and Ray sends it only where it is told to.
            os.environ.setdefault("RAY_AUTH_MODE", "token")
        with _preserve_signal_handlers():
            import ray
            from ray import serve

            self._was_initialized = ray.is_initialized()  # a notebook's
            if not self._was_initialized:
                self._init_ray(start)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        self._connected = True
        # Beyond this machine every replica asks for a key.
        host = LOOPBACK if self.started_here else ALL_INTERFACES
        options = {"host": host, "port": port or (free_port() if self.started_here else SERVE_PORT)}
        serve.start(http_options=options, logging_config={"log_level": "ERROR"})

    def _init_ray(self, start: bool) -> None:
        import ray

        common = {"logging_level": logging.ERROR, "log_to_driver": False, "namespace": NAMESPACE}
        address = os.environ.get("RAY_ADDRESS") or None
        try:
            if address == "local":
                raise ConnectionError("a local one is asked for")
            _check_port_open(address or "")
            ray.init(address="auto", **common)
        except ConnectionError as error:
            if address not in (None, "local") or not start:
                message = " ".join(str(error).split())[:200]
                raise ServerError(f"no Ray cluster answers: {message}", location=address, hint=ADDRESS_HINT) from None
            self._log("starting a local Ray cluster (some 10 s)")
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            with spawn.without_excluded_variables():
                ray.init(address="local", include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **common)
            self.started_here = True

    @property
    def is_local_only(self) -> bool:
        """Whether only this machine reaches what is served."""
        return _http_address()[0] in (LOOPBACK, "localhost", "::1")

    def serve_exclusively(self, model: ServedModel) -> tuple[list[str], str | None]:
        """Serve ``model`` and nothing else of ours, and wait for it: its URLs, and the key that they ask for. One that
        ``rlaif serve`` keeps up with these settings is used as it is, with the environment's key."""
        self.connect()
        name = model.application_name
        if self._exclusive_app and self._exclusive_app[0] == name and _running_application(self._exclusive_app[1]):
            return self.base_urls(self._exclusive_app[1]), self._exclusive_app[2]
        if _running_application(name):
            self._log(f"{model.name} is served on the cluster already, as {name}")
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
        """Begin to serve ``model`` as ``name``, on one of ``num_shares`` equal parts of the cluster's GPUs unless
        replicas are given. Returns at once. Raises :class:`UsageError` where a local cluster can never hold it."""
        import ray
        from ray import serve

        resources, config = ray.cluster_resources(), self._config
        gpus = model.gpus if resources.get("GPU") else 0
        max_fitting = max(1, int(resources["GPU"]) // num_shares // gpus) if gpus else 1
        min_replicas = config.replicas or (1 if config.max_replicas else max_fitting)
        for kind, per_replica, setting in (("CPU", config.cpus, "cpus"), ("GPU", gpus, "tensor_parallel_size")):
            if self.started_here and per_replica * min_replicas > resources.get(kind, 0):
                raise UsageError(
                    f"{min_replicas} x {model.name} would take {per_replica * min_replicas:g} {kind}s, and there are {resources.get(kind, 0):g}",
                    hint=f"Lower replicas or {setting}, or name a larger cluster in RAY_ADDRESS.",
                )
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
        self._log(f"serving {model.name} on Ray: {replica_range} x vLLM, each with {gpus or f'{config.cpus:g}'} "
                  f"{'GPU' if gpus else 'CPU'}(s)")  # fmt: skip
        self._deployed.append(name)
        target = serve.RunTarget(application, name=name, route_prefix=f"/{name}")
        serve.run_many([target], wait_for_applications_running=False)

    def wait(self, model: ServedModel, name: str) -> None:
        """Until every replica that was asked for is up. Raises :class:`ServerError` with what Ray says."""
        began = last_logged = time.monotonic()
        while True:
            application, waited = _running_application(name), time.monotonic() - began
            if application and application.status == "RUNNING":
                self._log(f"{model.name} is ready after {waited:.0f} s")
                return
            error = (
                _error_from_log(" ".join(deployment.message for deployment in application.deployments.values()))
                if application
                else ""
            )
            if (
                not application
                or application.status not in STARTING_STATUSES
                or waited > self._client.server_start_timeout_s
            ):
                raise ServerError(
                    f"Ray could not serve {model.name}: {error or (application and application.message) or 'it was taken down'}",
                    hint="`serve status` and Ray's logs say more. The same command tries again.",
                )
            if time.monotonic() - last_logged >= LOG_INTERVAL_S:
                last_logged = time.monotonic()
                self._log(f"{model.name}: {describe_replicas(name)} ({waited:.0f} s){': ' if error else ''}{error}")
            time.sleep(POLL_INTERVAL_S)

    def base_urls(self, name: str) -> list[str]:
        """The application's base URLs: one, or one a node of a cluster that is reached from outside."""
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
        """Take down what this process serves, or the one of that name, whoever serves it. Whether there was any."""
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
        """Let what was deployed outlive this process."""
        self._deployed.clear()

    def close(self) -> None:
        """Take down what this process serves, and the cluster where it is its own."""
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
    """How many replicas of an application are in which state, in words; ``NOT_DEPLOYED`` where it is not there."""
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
    """Raises ConnectionError where nobody listens at ``HOST:PORT``, which Ray takes minutes to say."""
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        if parts.hostname and parts.port:
            socket.create_connection((parts.hostname, parts.port), CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        raise ConnectionError(os_error_message(error) if isinstance(error, OSError) else str(error)) from None


def _running_application(name: str) -> Any:
    """What Serve says of an application, or None."""
    from ray import serve

    application = serve.status().applications.get(name)
    return None if application is None or application.status == "DELETING" else application


def _error_from_log(message: str) -> str:
    """The error in a message of Ray's, out of its tracebacks; nothing where there is none."""
    errors = re.findall(r"^\s*(?:[\w.]*\.)?\w*Error: (.+)$", message, re.MULTILINE)
    return " ".join(errors[-1].split())[:400] if errors else ""


def _http_address() -> tuple[str, int]:
    from ray.serve.context import _get_global_client

    client: Any = _get_global_client()
    return client.http_config.host, client.http_config.port


@contextlib.contextmanager
def _preserve_signal_handlers() -> Iterator[None]:
    """Ray puts its own handlers in place of ours."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {signal_number: signal.getsignal(signal_number) for signal_number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for signal_number, handler in handlers.items():
            signal.signal(signal_number, handler)
