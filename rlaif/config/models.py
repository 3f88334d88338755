"""What a person asks for, with its defaults: one class a section of rlaif.toml. ``rlaif.config.loader`` fills them in.

``RESUME_RULES`` is the one table that says what may change when a run is resumed: identity fields decide what the
answers are and may not, once there is something that they decided; growing fields may become larger; everything else is
operational and free.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from rlaif.errors import UsageError

CHECK_JUDGE = "check"
"""Instead of a judge's name: the prompts' own checks."""
Strategy = Literal["auto", "rate-then-compare", "round-robin", "rate-only"]


def _reject_credentials(url: str) -> str:
    """Settings are written into the manifest, so no secret may stand in them."""
    try:
        login = urlsplit(url).username or urlsplit(url).password
    except ValueError:
        login = None  # no URL at all: the client says so
    if login:
        raise ValueError("a URL may hold no name or password: put the key into the environment as OPENAI_API_KEY")
    return url


def _reject_api_key(options: dict[str, Any]) -> dict[str, Any]:
    if any(name.replace("-", "_") in ("api_key", "hf_token") for name in options):
        raise ValueError("a key may not stand in a file; the server's own is drawn at each start")
    return options


Url = Annotated[str, AfterValidator(_reject_credentials)]


class ConfigSection(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class PromptsConfig(ConfigSection):
    sources: list[str] = []
    heldout_fraction: float = Field(default=0.05, ge=0, lt=1)
    near_duplicate_threshold: float = Field(default=0.9, ge=0, le=1)
    decontaminate_against: list[str] = []
    on_bad_row: Literal["stop", "skip"] = "stop"
    limit: int | None = Field(default=None, ge=1)

    @field_validator("sources", "decontaminate_against", mode="before")
    @classmethod
    def _listify(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class PolicyConfig(ConfigSection):
    """One model of the pool that answers the prompts."""

    model: str = Field(min_length=1)
    base_url: list[Url] = []

    @field_validator("base_url", mode="before")
    @classmethod
    def _listify(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class SamplerConfig(ConfigSection):
    model: list[str] = []
    base_url: list[Url] = []
    n: int = Field(default=4, ge=1, le=128)
    temperature: float = Field(default=1.0, ge=0, le=5)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_tokens: int = Field(default=1024, ge=1)
    system: str | None = None
    send_seed: bool = True
    vllm: Annotated[dict[str, Any], AfterValidator(_reject_api_key)] = {}

    @field_validator("model", "base_url", mode="before")
    @classmethod
    def _listify(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class PanelMemberConfig(ConfigSection):
    """One seat of the panel: a judge file, the model that fills it, its weight, and settings of vLLM's for this seat
    over those of ``[judge.vllm]``."""

    name: str = Field(min_length=1)
    model: str = Field(min_length=1)
    base_url: list[Url] = []
    weight: float = Field(default=1.0, gt=0)
    vllm: Annotated[dict[str, Any], AfterValidator(_reject_api_key)] = {}

    @field_validator("base_url", mode="before")
    @classmethod
    def _listify(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class JudgeConfig(ConfigSection):
    panel: list[str] = ["helpful", "quality"]
    model: str | None = None
    base_url: list[Url] = []
    strategy: Strategy = "auto"
    output_mode: Literal["auto", "choice", "logprobs", "json"] = "auto"
    samples_per_verdict: int = Field(default=1, ge=1, le=32)
    allow_failed_exam: bool = False
    limit: int | None = Field(default=None, ge=1)
    max_tokens: int = Field(default=1024, ge=1)
    vllm: Annotated[dict[str, Any], AfterValidator(_reject_api_key)] = {}

    @field_validator("panel", "base_url", mode="before")
    @classmethod
    def _listify(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class PairsConfig(ConfigSection):
    """Which pairs are kept, and who labels them.

    ``min_chosen_rating``: what the chosen answer must have been rated at least, of 1 to 5. ``max_tie_drop_fraction``:
    the share of the prompts that may be left without a pair because their answers are too much alike (1: as many as
    there are).
    """

    min_confidence: float = Field(default=0.65, ge=0.5, le=1)
    min_chosen_rating: float = Field(default=2.0, ge=0, le=5)
    max_tie_drop_fraction: float = Field(default=1.0, ge=0, le=1)
    min_rating_margin: float = Field(default=1.0, ge=0)
    max_per_prompt: int = Field(default=1, ge=1)
    max_candidates_per_prompt: int = Field(default=2, ge=1, le=8)
    human_fraction: float = Field(default=0.10, ge=0, le=1)
    test_fraction: float = Field(default=0.05, ge=0, lt=1)


class ReviewConfig(ConfigSection):
    """Who labels the queue and how often. Gold pairs and second labels need people with links (``annotators``)."""

    annotators: list[Annotated[str, Field(min_length=1)]] = []
    lead: str = Field(default="lead", min_length=1)
    labels_per_pair: int = Field(default=1, ge=1, le=9)
    extra_label_fraction: float = Field(default=0.15, ge=0, le=1)
    gold: str | None = None
    gold_fraction: float = Field(default=0.05, ge=0, le=0.5)
    guidelines: str | None = None

    @field_validator("annotators", mode="before")
    @classmethod
    def _split_names(cls, value: Any) -> Any:
        names = value.split(",") if isinstance(value, str) else value
        return [name.strip() if isinstance(name, str) else name for name in names] if isinstance(names, list) else names

    @model_validator(mode="after")
    def _require_distinct_names(self) -> ReviewConfig:
        names = [*self.annotators, self.lead]
        if len(set(names)) < len(names):
            raise ValueError("every annotator and the lead need a name of their own")
        return self


class TrainConfig(ConfigSection):
    """What training is asked to do.

    ``batch_size`` is the effective one, in pairs a step; ``per_device_batch_size`` only says how many of them stand in
    memory at once (KTO's KL term is estimated within them, from two or more). ``learning_rate`` and ``loss`` left out
    are the method's own. ``max_steps`` None is ``epochs``. ``num_processes`` are those of each machine,
    ``num_machines`` and what follows else found in the environment. ``qlora`` keeps an adapter's frozen base in 4 bits
    (QLoRA). ``trl`` passes further settings of TRL's configuration through by name.
    """

    method: Literal["dpo", "kto", "sft", "reward", "rloo", "ppo"] = "dpo"
    model: str | None = None
    output: str | None = None
    lora: bool = True
    qlora: bool = False
    lora_r: int = Field(default=16, ge=1)
    lora_alpha: int = Field(default=32, ge=1)
    merge: bool = True
    beta: float = Field(default=0.1, gt=0)
    loss: list[str] = []
    reward_model: str | None = None
    learning_rate: float | None = Field(default=None, gt=0)
    epochs: float = Field(default=1.0, gt=0)
    max_steps: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=8, ge=1)
    per_device_batch_size: int = Field(default=2, ge=1)
    max_length: int = Field(default=1024, ge=16)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    save_steps: int = Field(default=50, ge=1)
    overwrite: bool = False
    launcher: Literal["none", "accelerate"] = "none"
    num_processes: int | None = Field(default=None, ge=1)
    num_machines: int | None = Field(default=None, ge=1)
    machine_rank: int | None = Field(default=None, ge=0)
    main_process_address: str | None = None
    sharding: Literal["fsdp", "deepspeed", "ddp"] = "fsdp"
    trl: dict[str, Any] = {}

    @field_validator("loss", mode="before")
    @classmethod
    def _listify(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class EvaluateConfig(ConfigSection):
    """How the trained model is compared with its reference. Without ``judges``, by the run's own comparing judges.
    ``kl_samples``: answers from which the KL divergence is estimated; 0 leaves it out."""

    sources: list[str] = []
    limit: int | None = Field(default=None, ge=1)
    judges: list[str] = []
    model: str | None = None
    base_url: list[Url] = []
    kl_samples: int = Field(default=64, ge=0)

    @field_validator("sources", "judges", "base_url", mode="before")
    @classmethod
    def _listify(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class IterationConfig(ConfigSection):
    """Where this run stands in a series: ``previous_run`` is the run that it goes on from, as a path from this one."""

    previous_run: str | None = None


class ClientConfig(ConfigSection):
    """How requests are sent to models. The limits per minute hold for each endpoint. ``timeout_s``: how long a server
    may make no progress (:mod:`rlaif.serving.time_limits`). ``request_deadline_s``: how long a request may take with
    all its attempts.
    """

    concurrency: int = Field(default=64, ge=1, le=4096)
    use_batch_api: bool = False
    requests_per_minute: float | None = Field(default=None, gt=0)
    tokens_per_minute: float | None = Field(default=None, gt=0)
    timeout_s: float = Field(default=600, gt=0)
    request_deadline_s: float = Field(default=3600, gt=0)
    max_attempts: int = Field(default=6, ge=1, le=50)
    max_failures: int = Field(default=0, ge=0)
    budget_usd: float | None = Field(default=None, gt=0)
    server_python: str | None = None
    server_start_timeout_s: float = Field(default=1800, gt=0)


class ClusterConfig(ConfigSection):
    """Where models without a ``base_url`` run: on this machine, or on a Ray cluster.

    ``replicas`` None is as many as the cluster has GPUs for; with ``max_replicas`` there are between the two, by load.
    ``cpus``: what a replica takes of them. Its GPUs follow from vLLM's own settings.
    """

    backend: Literal["local", "ray"] = "local"
    replicas: int | None = Field(default=None, ge=1)
    max_replicas: int | None = Field(default=None, ge=1)
    cpus: float = Field(default=1, gt=0)

    @model_validator(mode="after")
    def _check_replica_bounds(self) -> ClusterConfig:
        if self.replicas and self.max_replicas and self.max_replicas < self.replicas:
            raise ValueError("max_replicas is less than replicas")
        return self


def parse_duration_s(text: str) -> float:
    """``8h``, ``90m``, ``1h30m``, ``45s`` in seconds. Raises ValueError."""
    match = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+)m(?:in)?)?(?:(\d+)s)?", text.strip())
    if not text.strip() or not match:
        raise ValueError(f"{text!r} is no duration: write it like 8h, 90m or 1h30m")
    hours, minutes, seconds = (float(part or 0) for part in match.groups())
    total = hours * 3600 + minutes * 60 + seconds
    if total <= 0:
        raise ValueError(f"{text!r} is no time at all")
    return total


def _validate_duration(text: str) -> str:
    parse_duration_s(text)
    return text


def _validate_time_of_day(text: str) -> str:
    if not re.fullmatch(r"([01]?\d|2[0-3]):[0-5]\d", text):
        raise ValueError(f"{text!r} is no time of day: write it like 07:00")
    return text


class RunConfig(ConfigSection):
    """What ``rlaif run`` does around the stages. ``until`` is a time of day, ``max_duration`` counts from the start;
    the earlier one is the deadline. ``pilot_prompts``: prompts that are taken through generate and judge first, for the
    estimate; 0 for none. ``evaluate``: the trained model against its reference at the end. ``train_fraction``: of the
    time to the deadline, where training is asked for and not all fits."""

    until: Annotated[str, AfterValidator(_validate_time_of_day)] | None = None
    max_duration: Annotated[str, AfterValidator(_validate_duration)] | None = None
    train: bool = False
    evaluate: bool = False
    pilot_prompts: int = Field(default=64, ge=0)
    train_fraction: float = Field(default=0.25, ge=0, lt=1)
    min_free_disk_gb: float = Field(default=2.0, ge=0)
    # A webhook's address is often a secret: it is left out of what is written into the manifest.
    notify_url: str | None = Field(default=None, exclude=True, repr=False)
    notify_command: str | None = None


class Config(ConfigSection):
    """The resolved settings of a run. ``policies`` and ``panel`` are what the stages read."""

    seed: int = 0
    prompts: PromptsConfig = PromptsConfig()
    sampler: SamplerConfig = SamplerConfig()
    policies: list[PolicyConfig] = []
    judge: JudgeConfig = JudgeConfig()
    panel: list[PanelMemberConfig] = []
    pairs: PairsConfig = PairsConfig()
    review: ReviewConfig = ReviewConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    client: ClientConfig = ClientConfig()
    cluster: ClusterConfig = ClusterConfig()
    run: RunConfig = RunConfig()
    iteration: IterationConfig = IterationConfig()

    @model_validator(mode="after")
    def _reject_two_policy_settings(self) -> Config:
        if self.policies and self.sampler.model:
            raise ValueError("name the policy either as sampler.model or as [[policies]], not both")
        return self

    def policies_resolved(self) -> list[PolicyConfig]:
        """The models that answer: ``[[policies]]``, or each of ``sampler.model`` at ``sampler.base_url``."""
        if self.policies:
            return self.policies
        if not self.sampler.model:
            raise UsageError(
                "no policy model is named", hint="Give --model NAME, or set model under [sampler] in rlaif.toml."
            )
        return [PolicyConfig(model=name, base_url=self.sampler.base_url) for name in self.sampler.model]

    def panel_members(self) -> list[PanelMemberConfig]:
        """The seats of the panel: ``[[panel]]``, or each of ``judge.panel`` (``NAME`` or ``NAME@MODEL``). Checks are
        no seat: they run wherever a prompt has them, and ``check`` alone asks no model at all."""
        if self.panel:
            return self.panel
        members = []
        for spec in self.judge.panel:
            if spec == CHECK_JUDGE:
                continue
            name, _, model = spec.partition("@")
            model = model or self.judge.model or ""
            if not name:
                raise UsageError(f"{spec!r} names no judge", hint="Give --judge NAME or --judge NAME@MODEL.")
            if not model:
                raise UsageError(
                    f"judge {name!r} has no model",
                    hint="Give --model NAME (for every judge), --judge NAME@MODEL, or set model under [judge].",
                )
            members.append(PanelMemberConfig(name=name, model=model, base_url=self.judge.base_url))
        if not members and CHECK_JUDGE not in self.judge.panel:
            raise UsageError("no judge is named", hint="Give --judge NAME; `rlaif judges list` shows them.")
        return members


# What may change when a run is resumed, by stage. Anything not listed is operational and free to change.
RESUME_RULES: dict[str, dict[str, Literal["fixed", "may_grow"]]] = {
    "generate": {
        "seed": "fixed",
        "prompts.sources": "fixed",
        "prompts.heldout_fraction": "fixed",
        "prompts.near_duplicate_threshold": "fixed",
        "prompts.decontaminate_against": "fixed",
        "prompts.limit": "may_grow",
        "policies": "fixed",
        "sampler.n": "may_grow",
        "sampler.temperature": "fixed",
        "sampler.top_p": "fixed",
        "sampler.max_tokens": "fixed",
        "sampler.system": "fixed",
        "sampler.send_seed": "fixed",
    },
    "judge": {
        "seed": "fixed",
        "panel": "fixed",
        "judge.strategy": "fixed",
        "judge.output_mode": "fixed",
        "judge.samples_per_verdict": "fixed",
        "judge.max_tokens": "fixed",
        "judge.limit": "may_grow",
    },
}
