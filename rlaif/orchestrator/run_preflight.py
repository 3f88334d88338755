"""What a night finds out before anything is asked and paid: whether it can go through."""

from __future__ import annotations

import asyncio
import importlib.util
from dataclasses import dataclass, replace
from typing import Any

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
from rlaif.orchestrator.run_log import check_notification
from rlaif.planning import run_estimate
from rlaif.run.run import Run
from rlaif.serving import ray_cluster, vllm_server
from rlaif.train import methods


def preflight(run: Run, config: Config, *, generates: bool) -> tuple[list[str], list[EndpointCheck]]:
    """Everything that can be known before the first request. Returns lines to say, and who cannot be asked now: see
    :func:`raise_if_needed`.

    Raises what stands in the way: :class:`UsageError`, :class:`EndpointError`, :class:`MissingDependencyError`,
    :class:`RunError`.
    """
    check_notification(config.run)
    targets = [_policy_target(config, policy) for policy in config.policies_resolved()] if generates else []
    panel = load_panel(config)
    targets += [_judge_target(config, judge, "judge") for judge in panel]
    resolve_strategy(config, panel)
    judge_exam.require_passed_exam(panel, config, log=lambda _: None)  # judging says what there is to say of them
    if config.run.evaluate:
        reference = trained_model.require_evaluable(run, config, will_train=config.run.train)
        targets += [_judge_target(config, judge, "evaluate") for judge in eval_judges(config)]
        targets.append(EndpointCheck(reference, ()))  # it and what was trained of it lie here, and are served here
    if config.run.train:
        if config.train.method == "ppo":
            raise UsageError("ppo is not trained here but handed over to verl", location="train.method",
                             hint=f"Leave --train away, and give in the morning: rlaif train {run.path}")  # fmt: skip
        methods.get_method(config.train.method).trainer_kwargs(config.train)
        missing = [name for name in ("torch", "trl", "peft", "accelerate") if importlib.util.find_spec(name) is None]
        if missing:
            raise MissingDependencyError(f"training needs {', '.join(missing)}, not installed here", extra="train",
                                         hint="Or leave `--train` out.")  # fmt: skip
    free_bytes = run_estimate.free_bytes(run.path)
    if free_bytes < config.run.min_free_disk_gb * run_estimate.GB:
        raise RunError(
            f"only {free_bytes / run_estimate.GB:.1f} GB are free, and min_free_disk_gb is {config.run.min_free_disk_gb:g}",
            location=str(run.path),
            hint="Make room, or lower it under [run] in rlaif.toml.",
        )
    lines = [f"{free_bytes / run_estimate.GB:,.0f} GB free"]
    unreachable = list[EndpointCheck]()
    for target in dict.fromkeys(targets):
        if target.urls:
            client = Client(target.model, list(target.urls), config.client, UsageMeter())
            if config.client.budget_usd is not None:
                require_known_prices(client.model, client.urls)
            try:
                engine = asyncio.run(_probe(client))
            except EndpointError as error:
                if not run.journal_path("completions" if target.stage == "generate" else "verdicts").exists():
                    raise
                unreachable.append(replace(target, error=error))
                continue
            down_urls = client.usage.endpoints_down
            reachable = ", ".join(url for url in client.urls if url not in down_urls)
            lines.append(f"{reachable}: there, serves {target.model}" + (" by vLLM" if engine == "vllm" else ""))
            lines += [f"{url}: no server answers there now; it is looked for again" for url in down_urls]
        elif config.cluster.backend == "ray":
            ray_cluster.require_ray()
            lines.append(f"{target.model}: by vLLM on a Ray cluster")
        elif config.client.server_python:
            lines.append(f"{target.model}: by a vLLM of {config.client.server_python}")
        else:
            lines.append(f"{target.model}: by a vLLM that is started here ({vllm_server.vllm_variant()} build)")
    return list(dict.fromkeys(lines)), unreachable


@dataclass(frozen=True)
class EndpointCheck:
    """A model at its endpoints, for which stage; ``error``: why it cannot be asked now."""

    model: str
    urls: tuple[str, ...]
    stage: str = "evaluate"
    error: EndpointError | None = None


def _policy_target(config: Config, policy: PolicyConfig) -> EndpointCheck:
    if policy.base_url:
        reject_vllm_settings(config.sampler.vllm)
    return EndpointCheck(policy.model, tuple(policy.base_url), "generate")


def _judge_target(config: Config, judge: PanelJudge, stage: str) -> EndpointCheck:
    if judge.member_config.base_url:
        reject_vllm_settings(judge.vllm_settings(config))
    return EndpointCheck(judge.member_config.model, tuple(judge.member_config.base_url), stage)


def raise_if_needed(run: Run, config: Config, unreachable: list[EndpointCheck]) -> list[str]:
    """Raises the :class:`EndpointError` of one in ``unreachable`` by whom something is owed yet.
    Returns lines to say of the
    others. The prompts are taken in, and the run's lock is held."""
    lines = []
    for target in unreachable:
        assert target.error
        if _has_pending_work(run, config, target):
            raise target.error
        lines.append(f"{target.error.location}: {target.error.message}, and nothing is owed by {target.model}")
    return lines


def _has_pending_work(run: Run, config: Config, target: EndpointCheck) -> bool:
    """Where any answer is owed, or any verdict, so are those of every judge."""
    policies = list(enumerate(config.policies_resolved())) if config.policies or config.sampler.model else []
    with run.journal("completions") as journal:
        for policy_index, policy in policies:
            if target.stage == "generate" and (policy.model, tuple(policy.base_url)) != (target.model, target.urls):
                continue
            if any(True for _ in sampling.pending_requests(run, config, policy_index, journal)):
                return True
    if target.stage == "generate":
        return False
    if "judge" not in run.manifest()["stages"]:
        return True
    panel = load_panel(config)
    with run.journal("verdicts") as journal:
        try:
            strategy = resolve_strategy(config, panel)
            probe: Any = _ProbeBackends()
            JudgingRounds(run, config, probe, panel, strategy, journal, UsageMeter()).judge_all()
        except _WorkPendingError:
            return True
    try:
        return target.stage == "evaluate" and trained_model.existing_evaluation(run, config) is None
    except UsageError:  # nothing is trained yet
        return True


class _WorkPendingError(Exception):
    pass


class _ProbeBackends:
    """In the place of engines, which are asked for a client only where something is owed."""

    def client_for(self, *_: object) -> Client:
        raise _WorkPendingError


async def _probe(client: Client) -> str:
    async with client:
        return await client.check()
