"""Checks of ``rlaif run`` before the first request: settings, packages, disk space and endpoints."""

from __future__ import annotations

import asyncio
import importlib.util
from dataclasses import dataclass, replace

from rlaif.config.models import Config, PolicyConfig
from rlaif.errors import EndpointError, MissingDependencyError, RunError, UsageError
from rlaif.evaluate import trained_model
from rlaif.evaluate.run_evaluation import eval_judges
from rlaif.generate import sampling
from rlaif.judge.runner import PanelJudge
from rlaif.labeling import judge_exam
from rlaif.labeling.judging import JudgingRounds, load_panel, resolve_strategy
from rlaif.llm.backends import reject_vllm_settings
from rlaif.llm.client import Client
from rlaif.llm.executor import require_known_prices
from rlaif.llm.usage import UsageMeter
from rlaif.orchestrator.notify import check_notification
from rlaif.planning import run_estimate
from rlaif.run.run import Run
from rlaif.serving import ray_cluster, vllm_server
from rlaif.train import methods


@dataclass(frozen=True)
class EndpointCheck:
    """A model, the URLs of its servers (none if rlaif starts one) and the stage that asks it.

    ``error``: the reason why it cannot be reached now.
    """

    model: str
    urls: tuple[str, ...]
    stage: str = "evaluate"
    error: EndpointError | None = None


def preflight(run: Run, config: Config, *, generates: bool) -> tuple[list[str], list[EndpointCheck]]:
    """Check everything that is known before the first request. Returns log lines, and the endpoints that cannot be
    reached; :func:`raise_if_needed` decides about those.

    Raises :class:`UsageError`, :class:`EndpointError`, :class:`MissingDependencyError` or :class:`RunError`.
    """
    check_notification(config.run)
    targets = _targets(run, config, generates=generates)
    if config.run.train:
        _check_training(run, config)
    lines = [_check_free_disk(run, config)]
    unreachable = list[EndpointCheck]()
    for target in dict.fromkeys(targets):
        if not target.urls:
            lines.append(f"{target.model}: {_describe_managed_server(config)}")
            continue
        try:
            lines += _check_endpoint(target, config)
        except EndpointError as error:
            if not run.journal_path("completions" if target.stage == "generate" else "verdicts").exists():
                raise
            unreachable.append(replace(target, error=error))
    return list(dict.fromkeys(lines)), unreachable


def raise_if_needed(run: Run, config: Config, unreachable: list[EndpointCheck]) -> list[str]:
    """Raise the :class:`EndpointError` of the first endpoint in ``unreachable`` that has pending work.

    Returns log lines about the others. Requires that the prompts are ingested and that the run's lock is held.
    """
    lines = []
    for target in unreachable:
        assert target.error
        if has_pending_work(run, config, target):
            raise target.error
        lines.append(f"{target.error.location}: {target.error.message}, but no work is pending for {target.model}")
    return lines


def has_pending_work(run: Run, config: Config, target: EndpointCheck) -> bool:
    """Return True if the stage of ``target`` still needs its model. Sends no request.

    Every pending answer means pending verdicts too.
    """
    if _has_pending_answers(run, config, target):
        return True
    if target.stage == "generate":
        return False
    if "judge" not in run.manifest()["stages"]:
        return True
    panel = load_panel(config)
    with run.journal("verdicts") as journal:
        rounds = JudgingRounds(run, config, None, panel, resolve_strategy(config, panel), journal, UsageMeter())
        if rounds.has_pending_work():
            return True
    try:
        return target.stage == "evaluate" and trained_model.existing_evaluation(run, config) is None
    except UsageError:  # nothing is trained yet
        return True


def _has_pending_answers(run: Run, config: Config, target: EndpointCheck) -> bool:
    """Consider all policies, or only the policy of ``target`` if it is one."""
    policies = list(enumerate(config.policies_resolved())) if config.policies or config.sampler.model else []
    with run.journal("completions") as journal:
        for policy_index, policy in policies:
            if target.stage == "generate" and (policy.model, tuple(policy.base_url)) != (target.model, target.urls):
                continue
            if any(True for _ in sampling.pending_requests(run, config, policy_index, journal)):
                return True
    return False


def _targets(run: Run, config: Config, *, generates: bool) -> list[EndpointCheck]:
    """Return every model that the run asks. Raises if the panel or the evaluation is invalid."""
    targets = [_policy_target(config, policy) for policy in config.policies_resolved()] if generates else []
    panel = load_panel(config)
    targets += [_judge_target(config, judge, "judge") for judge in panel]
    resolve_strategy(config, panel)
    judge_exam.require_passed_exam(panel, config, log=lambda _: None)  # the judge stage logs its warnings
    if config.run.evaluate:
        reference = trained_model.require_evaluable(run, config, will_train=config.run.train)
        targets += [_judge_target(config, judge, "evaluate") for judge in eval_judges(config)]
        targets.append(EndpointCheck(reference, ()))  # rlaif serves it and the trained model from local files
    return targets


def _policy_target(config: Config, policy: PolicyConfig) -> EndpointCheck:
    if policy.base_url:
        reject_vllm_settings(config.sampler.vllm)
    return EndpointCheck(policy.model, tuple(policy.base_url), "generate")


def _judge_target(config: Config, judge: PanelJudge, stage: str) -> EndpointCheck:
    if judge.member_config.base_url:
        reject_vllm_settings(judge.vllm_settings(config))
    return EndpointCheck(judge.member_config.model, tuple(judge.member_config.base_url), stage)


def _check_training(run: Run, config: Config) -> None:
    if config.train.method == "ppo":
        raise UsageError(
            "`rlaif run --train` does not train with ppo: rlaif exports the data and verl trains",
            location="train.method",
            hint=f"Omit `--train`, and run `rlaif train {run.path}` when the run is done.",
        )
    methods.get_method(config.train.method).trainer_kwargs(config.train)
    missing = [name for name in ("torch", "trl", "peft", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(f"`--train` needs {', '.join(missing)}, not installed here", extra="train")


def _check_free_disk(run: Run, config: Config) -> str:
    free_bytes, min_free_gb = run_estimate.free_bytes(run.path), config.run.min_free_disk_gb
    if free_bytes < min_free_gb * run_estimate.GB:
        raise RunError(
            f"only {free_bytes / run_estimate.GB:.1f} GB of disk space are free; `min_free_disk_gb` is {min_free_gb:g}",
            location=str(run.path),
            hint="Free disk space, or lower `min_free_disk_gb` under [run] in rlaif.toml.",
        )
    return f"{free_bytes / run_estimate.GB:,.0f} GB of disk space free"


def _check_endpoint(target: EndpointCheck, config: Config) -> list[str]:
    """Ask the servers of ``target`` which models they serve. Raises :class:`EndpointError` if none can be used."""
    client = Client(target.model, list(target.urls), config.client, UsageMeter())
    if config.client.budget_usd is not None:
        require_known_prices(client.model, client.urls)
    engine = asyncio.run(_probe(client))
    down_urls = client.usage.endpoints_down
    reachable = ", ".join(url for url in client.urls if url not in down_urls)
    return [
        f"{reachable}: serves {target.model}" + (" with vLLM" if engine == "vllm" else ""),
        *(f"{url}: unreachable now; rlaif will try it again" for url in down_urls),
    ]


def _describe_managed_server(config: Config) -> str:
    """Raises :class:`MissingDependencyError` if Ray or vLLM is missing."""
    if config.cluster.backend == "ray":
        ray_cluster.require_ray()
        return "served by vLLM on a Ray cluster"
    if config.client.server_python:
        return f"served by the vLLM of {config.client.server_python}"
    return f"served by a vLLM that rlaif starts here ({vllm_server.vllm_variant()} build)"


async def _probe(client: Client) -> str:
    async with client:
        return await client.check()
