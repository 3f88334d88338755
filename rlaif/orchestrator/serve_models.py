"""A run's models kept up on a Ray cluster, for as many commands as want them."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

from rlaif.config.models import Config
from rlaif.errors import ServerError, UsageError
from rlaif.labeling.judging import load_panel
from rlaif.llm.reporter import Reporter
from rlaif.run.run import Run
from rlaif.serving import ray_cluster
from rlaif.serving.ray_cluster import RayCluster
from rlaif.serving.ray_replica import ServedModel

POLL_INTERVAL_S = 5.0


def models_to_serve(config: Config) -> list[ServedModel]:
    """Every model that the run's policies and judges need and that nobody else serves, each once for its settings."""
    models = [
        ServedModel(policy.model, config.sampler.vllm) for policy in config.policies_resolved() if not policy.base_url
    ]
    models += [
        ServedModel(judge.member_config.model, judge.vllm_settings(config))
        for judge in load_panel(config)
        if not judge.member_config.base_url
    ]
    return list({model.application_name: model for model in models}.values())


@contextlib.contextmanager
def serve_models(
    run: Run | None, config: Config, models: list[ServedModel], reporter: Reporter, *, port: int | None, detached: bool
) -> Iterator[dict[str, list[str]]]:
    """While open, ``models`` are up: their base URLs by application. ``detached`` leaves them up.

    Raises :class:`UsageError`, :class:`MissingDependencyError` or :class:`ServerError`.
    """
    if not models:
        raise UsageError("every model of this run has a base_url: there is nothing to serve")
    cluster = RayCluster(config.cluster, config.client, reporter.log, run.log if run else None)
    try:
        cluster.connect(port)
        api_key = os.environ.get("RLAIF_API_KEY") or None
        if not api_key and not cluster.is_local_only:
            raise UsageError(
                "whoever reaches the cluster could use the models",
                hint="Set a key for this command and for those that use them: "
                "export RLAIF_API_KEY=$(openssl rand -hex 16)",
            )
        if detached and cluster.started_here:
            raise UsageError(
                "a local cluster ends with the command that starts it, so nothing can be left up on it",
                hint="Leave --detach away, or start a cluster that stays: ray start --head",
            )
        for model in models:
            cluster.deploy(model, model.application_name, api_key, num_shares=len(models), detached=detached)
        for model in models:
            cluster.wait(model, model.application_name)
        if detached:
            cluster.detach()
        yield {model.application_name: cluster.base_urls(model.application_name) for model in models}
    finally:
        cluster.close()


def watch_replicas(models: list[ServedModel], reporter: Reporter) -> None:
    """Say whenever replicas come and go, until an interrupt. Raises :class:`ServerError` where one is gone."""
    last_states: dict[str, str] = {}
    while True:
        for model in models:
            state = ray_cluster.describe_replicas(model.application_name)
            if state == ray_cluster.NOT_DEPLOYED:
                raise ServerError(f"{model.name} is no longer served: somebody took {model.application_name} down")
            if last_states.setdefault(model.application_name, state) != state:
                last_states[model.application_name] = state
                reporter.log(f"{model.name}: {state}")
        time.sleep(POLL_INTERVAL_S)


def stop_models(config: Config, models: list[ServedModel], reporter: Reporter) -> list[str]:
    """End what was left up of ``models``. Returns the names of those that were there."""
    cluster = RayCluster(config.cluster, config.client, reporter.log)
    try:
        cluster.connect(start=False)
        return [model.application_name for model in models if cluster.stop(model.application_name)]
    finally:
        cluster.close()
