"""A Ray cluster as this process uses it: models are deployed there, found there, and taken down again.

The cluster is the one that ``RAY_ADDRESS`` names or that runs on this machine; where there is none, a local one is
started, and ends with us. To everybody else a model on Ray is a URL like any other, so journal, budget and retries know
nothing of it. What runs on the cluster is :mod:`rlaif.llm.replica`.
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
from rlaif.config import ClientConfig, ClusterConfig
from rlaif.errors import MissingPart, ServerError, UsageError, system_says
from rlaif.llm.port import LOOPBACK, free_port
from rlaif.llm.replica import NAMESPACE, Leash, Model, build

GONE = "gone"
PORT = 8000
"""Ray Serve's own."""
KNOCK_S = 10.0
LOOK_EVERY_S = 1.0
SAY_EVERY_S = 20.0
ENDING_S = 20.0
"""How long to look on while applications end. Ray ends them all the same."""
STORE_BYTES = 100 * 2**20
"""Of a local cluster's object store, which nothing of ours goes through."""

ANYWHERE = "0.0.0.0"  # noqa: S104
COMING = ("NOT_STARTED", "DEPLOYING")
MEND_ADDRESS = "Start it, or mend RAY_ADDRESS."
Say = Callable[[str], None]


def require_ray() -> None:
    """Raises :class:`MissingPart`."""
    if importlib.util.find_spec("ray") is None:
        raise MissingPart("Ray is not installed", mend="Install it: pip install 'rlaif[cluster]'")


class Cluster:
    """Connects (or starts) when it is first needed. ``log``: where the vLLMs of a local cluster write."""

    def __init__(self, config: ClusterConfig, client: ClientConfig, say: Say, log: Path | None = None) -> None:
        self._config, self._client, self._say, self._log = config, client, say, log
        self.ours = False
        """Whether the cluster was started here, and ends here."""
        self._connected = self._was_there = False
        self._leash: Any = None
        self._up: list[str] = []
        self._alone: tuple[str, str, str] | None = None

    def connect(self, port: int | None = None, *, start: bool = True) -> None:
        """Connect, or start a local one (unless told not to), with Serve on ``port`` where it does not run yet.

        Raises :class:`MissingPart` or :class:`ServerError`.
        """
        if self._connected:
            return
        require_ray()
        if (Path.home() / ".ray" / "auth_token").exists():
            # A cluster of this user's asks for the token, and Ray sends it only where it is told to.
            os.environ.setdefault("RAY_AUTH_MODE", "token")
        with _signals_kept():
            import ray
            from ray import serve

            self._was_there = ray.is_initialized()  # a notebook's
            if not self._was_there:
                self._init(start)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        self._connected = True
        # Beyond this machine every replica asks for a key.
        host = LOOPBACK if self.ours else ANYWHERE
        options = {"host": host, "port": port or (free_port() if self.ours else PORT)}
        serve.start(http_options=options, logging_config={"log_level": "ERROR"})

    def _init(self, start: bool) -> None:
        import ray

        quiet = {"logging_level": logging.ERROR, "log_to_driver": False, "namespace": NAMESPACE}
        address = os.environ.get("RAY_ADDRESS") or None
        try:
            if address == "local":
                raise ConnectionError("a local one is asked for")
            _knock(address or "")
            ray.init(address="auto", **quiet)
        except ConnectionError as error:
            if address not in (None, "local") or not start:
                told = " ".join(str(error).split())[:200]
                raise ServerError(f"no Ray cluster answers: {told}", where=address, mend=MEND_ADDRESS) from None
            self._say("starting a local Ray cluster (some 10 s)")
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            with spawn.without_them():
                ray.init(address="local", include_dashboard=False, object_store_memory=STORE_BYTES, **quiet)
            self.ours = True

    @property
    def loopback(self) -> bool:
        """Whether only this machine reaches what is served."""
        return _http()[0] in (LOOPBACK, "localhost", "::1")

    def alone(self, model: Model) -> tuple[list[str], str | None]:
        """Serve ``model`` and nothing else of ours, and wait for it: its URLs, and the key that they ask for. One that
        ``rlaif serve`` keeps up with these settings is used as it is, with the environment's key."""
        self.connect()
        name = model.application
        if self._alone and self._alone[0] == name and _status(self._alone[1]):
            return self.urls(self._alone[1]), self._alone[2]
        if _status(name):
            self._say(f"{model.name} is served on the cluster already, as {name}")
            self.wait(model, name)
            return self.urls(name), None
        self.take_down()
        own, key = f"{name}-{secrets.token_hex(2)}", secrets.token_hex(16)
        self.deploy(model, own, key)
        self.wait(model, own)
        self._alone = name, own, key
        return self.urls(own), key

    def deploy(self, model: Model, name: str, key: str | None, *, share: int = 1, detached: bool = False) -> None:
        """Begin to serve ``model`` as ``name``, on one of ``share`` equal parts of the cluster's GPUs unless replicas
        are given. Returns at once. Raises :class:`UsageError` where a local cluster can never hold it."""
        import ray
        from ray import serve

        there, wanted = ray.cluster_resources(), self._config
        gpus = model.gpus if there.get("GPU") else 0
        fit = max(1, int(there["GPU"]) // share // gpus) if gpus else 1
        least = wanted.replicas or (1 if wanted.max_replicas else fit)
        for kind, each, name_of in (("CPU", wanted.cpus, "cpus"), ("GPU", gpus, "tensor_parallel_size")):
            if self.ours and each * least > there.get(kind, 0):
                raise UsageError(
                    f"{least} x {model.name} would take {each * least:g} {kind}s, and there are {there.get(kind, 0):g}",
                    mend=f"Lower replicas or {name_of}, or name a larger cluster in RAY_ADDRESS.",
                )
        if not detached and self._leash is None:
            self._leash = f"leash-{secrets.token_hex(8)}"
            self._held = ray.remote(Leash).options(name=self._leash, namespace=NAMESPACE, num_cpus=0).remote()
        log = str(self._log.resolve()) if self._log and self.ours else None
        leash = None if detached else self._leash
        built = build(model, wanted, self._client, gpus, replicas=least, key=key, log=log, leash=leash)
        copies = f"{least} to {wanted.max_replicas}" if wanted.max_replicas else f"{least}"
        self._say(f"serving {model.name} on Ray: {copies} x vLLM, each with {gpus or f'{wanted.cpus:g}'} "
                  f"{'GPU' if gpus else 'CPU'}(s)")  # fmt: skip
        self._up.append(name)
        target = serve.RunTarget(built, name=name, route_prefix=f"/{name}")
        serve.run_many([target], wait_for_applications_running=False)

    def wait(self, model: Model, name: str) -> None:
        """Until every replica that was asked for is up. Raises :class:`ServerError` with what Ray says."""
        began = said = time.monotonic()
        while True:
            there, waited = _status(name), time.monotonic() - began
            if there and there.status == "RUNNING":
                self._say(f"{model.name} is ready after {waited:.0f} s")
                return
            told = _cause(" ".join(each.message for each in there.deployments.values())) if there else ""
            if not there or there.status not in COMING or waited > self._client.server_start_s:
                raise ServerError(
                    f"Ray could not serve {model.name}: {told or (there and there.message) or 'it was taken down'}",
                    mend="`serve status` and Ray's logs say more. The same command tries again.",
                )
            if time.monotonic() - said >= SAY_EVERY_S:
                said = time.monotonic()
                self._say(f"{model.name}: {replicas(name)} ({waited:.0f} s){': ' if told else ''}{told}")
            time.sleep(LOOK_EVERY_S)

    def urls(self, name: str) -> list[str]:
        """The application's base URLs: one, or one a node of a cluster that is reached from outside."""
        import ray
        from ray import serve

        host, port = _http()
        hosts = [host]
        if host == ANYWHERE:
            addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
            healthy = (node for node, state in serve.status().proxies.items() if state == "HEALTHY")
            hosts = sorted(addresses[node] for node in healthy if node in addresses)
        return [f"http://{f'[{each}]' if ':' in each else each}:{port}/{name}/v1" for each in hosts]

    def take_down(self, name: str | None = None) -> bool:
        """Take down what this process serves, or the one of that name, whoever serves it. Whether there was any."""
        from ray import serve

        names = [name] if name else self._up
        there = [each for each in names if _status(each)]
        for each in there:
            serve.delete(each, _blocking=False)
        self._up = [each for each in self._up if each not in names]
        until = time.monotonic() + ENDING_S
        while set(there) & set(serve.status().applications) and time.monotonic() < until:
            time.sleep(0.2)
        return bool(there)

    def leave_up(self) -> None:
        """Let what was deployed outlive this process."""
        self._up.clear()

    def close(self) -> None:
        """Take down what this process serves, and the cluster where it is its own."""
        if not self._connected:
            return
        import ray

        with _signals_kept():
            try:
                self.take_down()
            finally:
                self._connected = False
                if not self._was_there:
                    ray.shutdown()


def replicas(name: str) -> str:
    """How many replicas of an application are in which state, in words; ``GONE`` where it is not there."""
    there = _status(name)
    if not there:
        return GONE
    counts = [f"{count} {str(getattr(state, 'value', state)).lower()}" for each in there.deployments.values()
              for state, count in each.replica_states.items() if count]  # fmt: skip
    return f"replicas: {', '.join(sorted(counts)) or 'none'}"


def _knock(address: str) -> None:
    """Raises ConnectionError where nobody listens at ``HOST:PORT``, which Ray takes minutes to say."""
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        if parts.hostname and parts.port:
            socket.create_connection((parts.hostname, parts.port), KNOCK_S).close()
    except (OSError, ValueError) as error:
        raise ConnectionError(system_says(error) if isinstance(error, OSError) else str(error)) from None


def _status(name: str) -> Any:
    """What Serve says of an application, or None."""
    from ray import serve

    there = serve.status().applications.get(name)
    return None if there is None or there.status == "DELETING" else there


def _cause(message: str) -> str:
    """The error in a message of Ray's, out of its tracebacks; nothing where there is none."""
    told = re.findall(r"^\s*(?:[\w.]*\.)?\w*(?:Error|MissingPart): (.+)$", message, re.MULTILINE)
    return " ".join(told[-1].split())[:400] if told else ""


def _http() -> tuple[str, int]:
    from ray.serve.context import _get_global_client

    client: Any = _get_global_client()
    return client.http_config.host, client.http_config.port


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray puts its own handlers in place of ours."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
