"""What a night finds out before anything is asked and paid: whether it can go through."""

from __future__ import annotations

import asyncio
import importlib.util
from dataclasses import dataclass, replace

from rlaif.config import Config, PolicyConfig
from rlaif.errors import EndpointError, MissingPart, RunError, UsageError
from rlaif.generate import sample as sampling
from rlaif.judge.ask import Seat
from rlaif.llm import cluster, server
from rlaif.llm.ask import require_prices
from rlaif.llm.budget import Meter
from rlaif.llm.client import Client
from rlaif.llm.engines import refuse_settings
from rlaif.pipeline import exam, outlook, trained
from rlaif.pipeline.diary import check_notification
from rlaif.pipeline.evaluate import judges
from rlaif.pipeline.rounds import Rounds, panel, strategy
from rlaif.run.directory import Run
from rlaif.train import methods


def check(run: Run, config: Config, *, generates: bool) -> tuple[list[str], list[Asked]]:
    """Everything that can be known before the first request. Returns lines to say, and who cannot be asked now: see
    :func:`require_only_owed`.

    Raises what stands in the way: :class:`UsageError`, :class:`EndpointError`, :class:`MissingPart`, :class:`RunError`.
    """
    check_notification(config.run)
    asks = [_policy(config, policy) for policy in config.pool()] if generates else []
    seats = panel(config)
    asks += [_seat(config, seat, "judge") for seat in seats]
    strategy(config, seats)
    exam.require_trust(seats, config, say=lambda _: None)  # judging says what there is to say of them
    if config.run.evaluate:
        reference = trained.require(run, config, trains=config.run.train)
        asks += [_seat(config, seat, "evaluate") for seat in judges(config)]
        asks.append(Asked(reference, ()))  # it and what was trained of it lie here, and are served here
    if config.run.train:
        if config.train.method == "ppo":
            raise UsageError("ppo is not trained here but handed over to verl", where="train.method",
                             mend=f"Leave --train away, and give in the morning: rlaif train {run.path}")  # fmt: skip
        methods.of(config.train.method).keywords(config.train)
        lacking = [name for name in ("torch", "trl", "peft", "accelerate") if importlib.util.find_spec(name) is None]
        if lacking:
            raise MissingPart(f"training is asked for, and {', '.join(lacking)} is not installed",
                              mend="Install it: pip install 'rlaif[train]', or leave --train away.")  # fmt: skip
    free = outlook.free(run.path)
    if free < config.run.min_free_gb * outlook.GB:
        raise RunError(f"only {free / outlook.GB:.1f} GB are free, and min_free_gb is {config.run.min_free_gb:g}",
                       where=str(run.path), mend="Make room, or lower it under [run] in rlaif.toml.")  # fmt: skip
    lines = [f"{free / outlook.GB:,.0f} GB free"]
    absent = list[Asked]()
    for each in dict.fromkeys(asks):
        if each.urls:
            client = Client(each.model, list(each.urls), config.client, Meter())
            if config.client.budget_usd is not None:
                require_prices(client.model, client.urls)
            try:
                engine = asyncio.run(_ask(client))
            except EndpointError as error:
                if not run.journal_path("completions" if each.stage == "generate" else "verdicts").exists():
                    raise
                absent.append(replace(each, error=error))
                continue
            down = client.meter.down
            there = ", ".join(url for url in client.urls if url not in down)
            lines.append(f"{there}: there, serves {each.model}" + (" by vLLM" if engine == "vllm" else ""))
            lines += [f"{url}: no server answers there now; it is looked for again" for url in down]
        elif config.cluster.on == "ray":
            cluster.require_ray()
            lines.append(f"{each.model}: by vLLM on a Ray cluster")
        elif config.client.server_python:
            lines.append(f"{each.model}: by a vLLM of {config.client.server_python}")
        else:
            lines.append(f"{each.model}: by a vLLM that is started here ({server.build()} build)")
    return list(dict.fromkeys(lines)), absent


@dataclass(frozen=True)
class Asked:
    """A model at its endpoints, for which stage; ``error``: why it cannot be asked now."""

    model: str
    urls: tuple[str, ...]
    stage: str = "evaluate"
    error: EndpointError | None = None


def _policy(config: Config, policy: PolicyConfig) -> Asked:
    if policy.base_url:
        refuse_settings(config.sampler.vllm)
    return Asked(policy.model, tuple(policy.base_url), "generate")


def _seat(config: Config, seat: Seat, stage: str) -> Asked:
    if seat.entry.base_url:
        refuse_settings(seat.vllm(config))
    return Asked(seat.entry.model, tuple(seat.entry.base_url), stage)


def require_only_owed(run: Run, config: Config, absent: list[Asked]) -> list[str]:
    """Raises the :class:`EndpointError` of one in ``absent`` by whom something is owed yet. Returns lines to say of the
    others. The prompts are taken in, and the run's lock is held."""
    lines = []
    for each in absent:
        assert each.error
        if _owes(run, config, each):
            raise each.error
        lines.append(f"{each.error.where}: {each.error.what}, and nothing is owed by {each.model}")
    return lines


def _owes(run: Run, config: Config, asked: Asked) -> bool:
    """Where any answer is owed, or any verdict, so are those of every judge."""
    pool = list(enumerate(config.pool())) if config.policies or config.sampler.model else []
    with run.journal("completions") as journal:
        for place, policy in pool:
            if asked.stage == "generate" and (policy.model, tuple(policy.base_url)) != (asked.model, asked.urls):
                continue
            if any(True for _ in sampling.requests(run, config, place, journal)):
                return True
    if asked.stage == "generate":
        return False
    if "judge" not in run.manifest()["stages"]:
        return True
    seats = panel(config)
    with run.journal("verdicts") as journal:
        try:
            Rounds(run, config, _Nobody(), seats, strategy(config, seats), journal, Meter()).all()  # type: ignore[arg-type]
        except _Owed:
            return True
    try:
        return asked.stage == "evaluate" and trained.measured(run, config) is None
    except UsageError:  # nothing is trained yet
        return True


class _Owed(Exception):
    pass


class _Nobody:
    """In the place of engines, which are asked for a client only where something is owed."""

    def client(self, *_: object) -> Client:
        raise _Owed


async def _ask(client: Client) -> str:
    async with client:
        return await client.check()
