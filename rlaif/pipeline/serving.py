"""A run's models kept up on a Ray cluster, for as many commands as want them."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

from rlaif.config import Config
from rlaif.errors import ServerError, UsageError
from rlaif.llm import cluster
from rlaif.llm.cluster import Cluster
from rlaif.llm.replica import Model
from rlaif.pipeline.commands import Watch
from rlaif.pipeline.rounds import panel
from rlaif.run.directory import Run

LOOK_EVERY_S = 5.0


def models(config: Config) -> list[Model]:
    """Every model that the run's policies and judges need and that nobody else serves, each once for its settings."""
    wanted = [Model(each.model, config.sampler.vllm) for each in config.pool() if not each.base_url]
    wanted += [Model(seat.entry.model, seat.vllm(config)) for seat in panel(config) if not seat.entry.base_url]
    return list({model.application: model for model in wanted}.values())


@contextlib.contextmanager
def serving(
    run: Run | None, config: Config, wanted: list[Model], watch: Watch, *, port: int | None, detached: bool
) -> Iterator[dict[str, list[str]]]:
    """While open, the models ``wanted`` are up: their base URLs by application. ``detached`` leaves them up.

    Raises :class:`UsageError`, :class:`MissingPart` or :class:`ServerError`.
    """
    if not wanted:
        raise UsageError("every model of this run has a base_url: there is nothing to serve")
    used = Cluster(config.cluster, config.client, watch.say, run.log if run else None)
    try:
        used.connect(port)
        key = os.environ.get("RLAIF_API_KEY") or None
        if not key and not used.loopback:
            raise UsageError(
                "whoever reaches the cluster could use the models",
                mend="Set a key for this command and for those that use them: "
                "export RLAIF_API_KEY=$(openssl rand -hex 16)",
            )
        if detached and used.ours:
            raise UsageError(
                "a local cluster ends with the command that starts it, so nothing can be left up on it",
                mend="Leave --detach away, or start a cluster that stays: ray start --head",
            )
        for model in wanted:
            used.deploy(model, model.application, key, share=len(wanted), detached=detached)
        for model in wanted:
            used.wait(model, model.application)
        if detached:
            used.leave_up()
        yield {model.application: used.urls(model.application) for model in wanted}
    finally:
        used.close()


def stay(wanted: list[Model], watch: Watch) -> None:
    """Say whenever replicas come and go, until an interrupt. Raises :class:`ServerError` where one is gone."""
    said: dict[str, str] = {}
    while True:
        for model in wanted:
            now = cluster.replicas(model.application)
            if now == cluster.GONE:
                raise ServerError(f"{model.name} is no longer served: somebody took {model.application} down")
            if said.setdefault(model.application, now) != now:
                said[model.application] = now
                watch.say(f"{model.name}: {now}")
        time.sleep(LOOK_EVERY_S)


def take_down(config: Config, wanted: list[Model], watch: Watch) -> list[str]:
    """End what was left up of ``wanted``. Returns the names of those that were there."""
    used = Cluster(config.cluster, config.client, watch.say)
    try:
        used.connect(start=False)
        return [model.application for model in wanted if used.take_down(model.application)]
    finally:
        used.close()
