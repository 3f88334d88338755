"""``rlaif serve``: keep the models of a run on a Ray cluster, for any number of commands."""

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
    """Return the policies and judges without a ``base_url``, each once per vLLM settings."""
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
    """Serve ``models`` while open. Yields their base URLs by application name.

    ``port``: of Ray Serve, if it is not running yet. ``detached``: leave the models running at the end.
    Raises :class:`UsageError`, :class:`MissingDependencyError` or :class:`ServerError`.
    """
    if not models:
        raise UsageError(
            "there is nothing to serve: every model of this run has a `base_url`",
            location=str(run.path) if run else None,
            hint="Remove `base_url` from rlaif.toml for the models that the cluster should serve.",
        )
    cluster = RayCluster(config.cluster, config.client, reporter.log, run.log if run else None)
    try:
        cluster.connect(port)
        api_key = os.environ.get("RLAIF_API_KEY") or None
        if not api_key and not cluster.is_local_only:
            raise UsageError(
                "the cluster is reachable from other machines, and RLAIF_API_KEY is not set",
                hint="Set one key for this command and the runs: `export RLAIF_API_KEY=$(openssl rand -hex 16)`.",
            )
        if detached and cluster.started_here:
            raise UsageError(
                "`--detach` needs a running cluster: a local cluster ends with the command that starts it",
                hint="Omit `--detach`, or start a cluster first with `ray start --head`.",
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
    """Log changes in the number of replicas until an interrupt. Raises :class:`ServerError` if a model was stopped."""
    last_states: dict[str, str] = {}
    while True:
        for model in models:
            state = ray_cluster.describe_replicas(model.application_name)
            if state == ray_cluster.NOT_DEPLOYED:
                raise ServerError(
                    f"{model.name} is no longer served: the application {model.application_name} was stopped"
                )
            if last_states.setdefault(model.application_name, state) != state:
                last_states[model.application_name] = state
                reporter.log(f"{model.name}: {state}")
        time.sleep(POLL_INTERVAL_S)


def stop_models(config: Config, models: list[ServedModel], reporter: Reporter) -> list[str]:
    """Stop those of ``models`` that are running. Returns their application names."""
    cluster = RayCluster(config.cluster, config.client, reporter.log)
    try:
        cluster.connect(start=False)
        return [model.application_name for model in models if cluster.stop(model.application_name)]
    finally:
        cluster.close()
