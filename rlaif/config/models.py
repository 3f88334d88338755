"""The settings of a run: one class per section of rlaif.toml. ``rlaif.config.loader`` fills them in.

Each setting is declared once, with its description, default, limits, example and resume rule. Everything else that
describes it is generated from here: the template that ``rlaif init`` writes, the help of the flags
(``rlaif/cli/settings_help.py``), docs/reference/config.md, the JSON schema, and ``config.resume.RESUME_RULES``.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from rlaif.config.choices import (
    Backend,
    DataType,
    Launcher,
    OnBadRow,
    OutputMode,
    Sharding,
    Strategy,
    TrainMethod,
)
from rlaif.config.fields import Duration, NamesOfPeople, OneOrMore, TimeOfDay, Url, VllmOptions, setting
from rlaif.errors import UsageError

CHECK_JUDGE = "check"
"""Used instead of a judge's name: the prompts' own checks."""


class ConfigSection(BaseModel):
    """Base of all sections: unknown names are errors, and values are immutable.

    The first paragraph of a section's docstring is its introduction in the template and in the reference.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class PromptsConfig(ConfigSection):
    """Prompts of the run, and those set aside for evaluation."""

    sources: OneOrMore[str] = setting(
        [],
        "Packaged set, file, hf:NAME, or s3://, gs:// or az:// URL",
        details="`rlaif prompts list` shows the packaged sets. Files are .jsonl, .parquet or .csv; the Hub is "
        '"hf:NAME[@CONFIG][:SPLIT]"; a URL names a file or folder, such as "s3://BUCKET/PATH". Several are combined.',
        starter=["everyday"],
        resume="fixed",
    )
    heldout_fraction: float = setting(
        0.05,
        "Fraction of prompts held out for evaluation",
        details="They are never trained on, nor are near duplicates of them.",
        resume="fixed",
        ge=0,
        lt=1,
    )
    near_duplicate_threshold: float = setting(
        0.9,
        "Similarity from which a prompt counts as a duplicate of an earlier one and is dropped",
        details="Jaccard similarity over runs of five words: at 0.9, about one word in a hundred differs. 0 drops only "
        "exact duplicates.",
        resume="fixed",
        ge=0,
        le=1,
    )
    decontaminate_against: OneOrMore[str] = setting(
        [], "Evaluation files; prompts that overlap them are dropped", example=["benchmark.jsonl"], resume="fixed"
    )
    on_bad_row: OnBadRow = setting("stop", "Action at an invalid row: stop before anything is asked, or skip the row")
    limit: int | None = setting(None, "Maximum number of prompts", example=1000, resume="may_grow", ge=1)


class PolicyConfig(ConfigSection):
    """Pool of policies in which each model has its own server. Replaces `sampler.model` and `sampler.base_url`."""

    model: str = setting(..., "Policy model", example="Qwen/Qwen3-8B", resume="fixed", min_length=1)
    base_url: OneOrMore[Url] = setting(
        [],
        "OpenAI-compatible servers of this model",
        default_text="rlaif starts vLLM",
        example=["http://127.0.0.1:8000/v1"],
    )


class SamplerConfig(ConfigSection):
    """Policy: the model that answers the prompts, and how answers are sampled."""

    model: OneOrMore[str] = setting(
        [],
        "Policy model; several form a pool",
        details='Hub name, path, or "demo" (the embedded SmolLM2-135M-Instruct).',
        starter=["demo"],
        resume="fixed",
        resume_key="policies",
    )
    base_url: OneOrMore[Url] = setting(
        [],
        "OpenAI-compatible server",
        default_text="rlaif starts vLLM",
        details="If you give several, requests go to the least loaded, and a failing server is paused. "
        '"file:PATH" names a file with one URL per line; it is read again during the run, so servers may come and go.',
        example=["http://127.0.0.1:8000/v1"],
    )
    n: int = setting(4, "Answers per prompt", resume="may_grow", ge=1, le=128)
    temperature: float = setting(1.0, "Sampling temperature", resume="fixed", ge=0, le=5)
    top_p: float = setting(
        1.0, "Nucleus sampling: probability mass of the tokens to sample from", resume="fixed", gt=0, le=1
    )
    max_tokens: int = setting(1024, "Maximum tokens per answer", resume="fixed", ge=1)
    system: str | None = setting(
        None, "System prompt for prompts without one", example="You are a helpful assistant.", resume="fixed"
    )
    send_seed: bool = setting(
        True,
        "Send a seed with each request",
        details="Some servers reject seeds. Without a seed, answers are not reproducible.",
        resume="fixed",
    )
    vllm: VllmOptions = setting(
        {},
        "vLLM options by name, for servers that rlaif starts",
        details="`rlaif doctor RUN` proposes values for the GPUs of this machine.",
        example={
            "max_model_len": 4096,
            "gpu_memory_utilization": 0.9,
            "tensor_parallel_size": 2,
            "data_parallel_size": 4,
        },
    )


class PanelMemberConfig(ConfigSection):
    """Panel in which each judge has its own model, server and weight. Replaces `judge.panel`, `judge.model` and
    `judge.base_url`.
    """

    name: str = setting(..., "Judge name", example="helpful", resume="fixed", min_length=1)
    model: str = setting(..., "Model for this judge", example="gpt-4.1-mini", resume="fixed", min_length=1)
    base_url: OneOrMore[Url] = setting(
        [],
        "OpenAI-compatible servers of this model",
        default_text="rlaif starts vLLM",
        example=["https://api.openai.com/v1"],
    )
    weight: float = setting(1.0, "Weight of this judge's vote", resume="fixed", gt=0)
    vllm: VllmOptions = setting(
        {},
        "vLLM options for this judge alone; they override those of `[judge.vllm]`",
        example={"gpu_memory_utilization": 0.5},
    )


class JudgeConfig(ConfigSection):
    """Judges that compare or rate the answers."""

    panel: OneOrMore[str] = setting(
        ["helpful", "quality"],
        "Judges on the panel: NAME or NAME@MODEL",
        details="`rlaif judges list` shows the names. The prompts' own checks always run and need not be named here; "
        '"check" alone asks no model.',
        starter=["helpful", "quality"],
        resume="fixed",
        resume_key="panel",
    )
    model: str | None = setting(
        None,
        "Judge model",
        details="For judges on the panel that name none. Prefer a model of another family than the policy's.",
        starter="demo",
        resume="fixed",
        resume_key="panel",
    )
    base_url: OneOrMore[Url] = setting(
        [], "OpenAI-compatible server", default_text="rlaif starts vLLM", example=["http://127.0.0.1:8001/v1"]
    )
    strategy: Strategy = setting(
        "auto",
        "Choice of answers to compare",
        details='"rate-then-compare" compares the best-rated answer with the worst, "round-robin" all pairs, '
        '"rate-only" none; "auto" depends on the kinds of the judges.',
        resume="fixed",
    )
    output_mode: OutputMode = setting(
        "auto",
        "Format in which verdicts are requested",
        details='"choice" needs vLLM, "logprobs" a server that returns token probabilities, "json" works with any '
        'server; "auto" detects what the server supports.',
        resume="fixed",
    )
    samples_per_verdict: int = setting(
        1,
        'Samples that are averaged into one verdict, with output mode "json"',
        details="Classifications always use one sample.",
        resume="fixed",
        ge=1,
        le=32,
    )
    allow_failed_exam: bool = setting(
        False,
        "Use judges that failed their exam",
        details="By default rlaif rejects a judge whose exam (`rlaif judges exam`) shows that its labels are "
        "worthless.",
    )
    limit: int | None = setting(None, "Maximum number of prompts to judge", example=1000, resume="may_grow", ge=1)
    max_tokens: int = setting(1024, "Maximum tokens per verdict", resume="fixed", ge=1)
    vllm: VllmOptions = setting(
        {}, "vLLM options by name, for servers that rlaif starts", example={"max_model_len": 8192}
    )


class PairsConfig(ConfigSection):
    """Pairs that are kept, and the fractions for human review and for the test split."""

    min_confidence: float = setting(0.65, "Minimum probability for the better answer, 0.5 to 1", ge=0.5, le=1)
    min_rating_margin: float = setting(
        1.0,
        "Minimum rating difference within a pair",
        details="On the scale from 1 to 5. Applies only if the answers are rated.",
        ge=0,
    )
    min_chosen_rating: float = setting(
        2.0,
        "Minimum rating of the better answer",
        details="On the scale from 1 to 5. Applies only if the answers are rated. A model learns nothing from the "
        "better of two bad answers.",
        ge=0,
        le=5,
    )
    max_tie_drop_fraction: float = setting(
        1.0,
        "Maximum fraction of prompts that may be left without a pair because their answers are too similar",
        details="1 sets no maximum. Below 1, the near ties with the highest confidence are kept; if the judges cannot "
        "decide at all, annotators do.",
        ge=0,
        le=1,
    )
    max_per_prompt: int = setting(1, "Maximum pairs kept per prompt", ge=1)
    max_candidates_per_prompt: int = setting(
        2,
        "Maximum candidate pairs compared per prompt",
        details="A further pair is compared if the ones before it are near ties or contradict the ratings.",
        ge=1,
        le=8,
    )
    human_fraction: float = setting(0.1, "Fraction of kept pairs queued for human review", ge=0, le=1)
    test_fraction: float = setting(
        0.05,
        "Fraction of prompts whose pairs go into the test split",
        details="Near-duplicate prompts go into the same split.",
        ge=0,
        lt=1,
    )


class ReviewConfig(ConfigSection):
    """Human review: the annotators and how often they label. Gold pairs and second labels need `annotators`."""

    annotators: NamesOfPeople = setting(
        [],
        "Names of the annotators; each gets a link",
        details="`rlaif review RUN` prints the links. Empty: one annotator, no link.",
        example=["ada", "bob"],
    )
    lead: str = setting("lead", "Name of the lead, who decides where annotators disagree", min_length=1)
    labels_per_pair: int = setting(1, "Annotators who label each pair", ge=1, le=9)
    extra_label_fraction: float = setting(
        0.15, "Fraction of pairs that one more annotator labels, to measure agreement", ge=0, le=1
    )
    gold: str | None = setting(
        None,
        "File of pairs with a known label, in the format of a judge's gold.jsonl",
        default_text="those of the judges",
        example="gold.jsonl",
    )
    gold_fraction: float = setting(0.05, "Fraction of the pairs shown that are gold pairs", ge=0, le=0.5)
    guidelines: str | None = setting(
        None, "Markdown file with the guidelines", default_text="the judges' rubrics", example="guidelines.md"
    )

    @model_validator(mode="after")
    def _require_distinct_names(self) -> ReviewConfig:
        names = [*self.annotators, self.lead]
        if len(set(names)) < len(names):
            raise ValueError("the names of the annotators and the lead must differ")
        return self


class TrainConfig(ConfigSection):
    """Training on the dataset."""

    method: TrainMethod = setting(
        "dpo",
        "Training method",
        details='"sft" trains on the chosen answers, "reward" trains a reward model, "rloo" is online RL, "ppo" writes '
        "the input of verl.",
        resume="retrain",
    )
    model: str | None = setting(
        None, "Model to train", default_text="the policy", example="Qwen/Qwen3-8B", resume="retrain"
    )
    output: str | None = setting(
        None,
        "Output folder",
        default_text="RUN/model",
        details="A relative path starts at the current directory.",
        example="my-model",
    )
    lora: bool = setting(True, "Train a LoRA adapter instead of all weights", resume="retrain")
    qlora: bool = setting(False, "Keep the adapter's frozen base in 4 bits (QLoRA); CUDA only", resume="retrain")
    lora_r: int = setting(16, "Rank of the adapter", resume="retrain", ge=1)
    lora_alpha: int = setting(32, "Scaling of the adapter: alpha", resume="retrain", ge=1)
    merge: bool = setting(True, "Merge the adapter into a complete model at the end")
    beta: float = setting(0.1, "Strength of the KL term", resume="retrain", gt=0)
    loss: OneOrMore[str] = setting(
        [],
        "TRL loss by name",
        default_text="the method's",
        details='For DPO that is "sigmoid".',
        example=["sigmoid"],
        resume="retrain",
    )
    reward_model: str | None = setting(
        None,
        "Reward model for rloo",
        details='The merged/ folder of a training with method = "reward".',
        example="reward/merged",
        resume="retrain",
    )
    learning_rate: float | None = setting(
        None, "Learning rate", default_text="depends on the method", example=1e-4, resume="retrain", gt=0
    )
    epochs: float = setting(1.0, "Number of epochs", resume="may_grow", gt=0)
    max_steps: int | None = setting(
        None, "Maximum number of training steps; overrides the epochs", example=500, resume="may_grow", ge=1
    )
    batch_size: int = setting(8, "Effective batch size, in pairs per step", resume="retrain", ge=1)
    per_device_batch_size: int = setting(
        2,
        "Pairs on one device at a time",
        details="Changes only memory and speed, except for KTO: it estimates its KL term within these pairs. So KTO "
        "needs at least 2, and the value affects its result.",
        ge=1,
    )
    max_length: int = setting(1024, "Maximum tokens of a prompt with its answer", resume="retrain", ge=16)
    dtype: DataType = setting(
        "auto", "Data type of the weights", details='"auto" depends on the device.', resume="retrain"
    )
    save_steps: int = setting(50, "Steps between two checkpoints", ge=1)
    overwrite: bool = setting(False, "Train again over a model that was trained on other rows or with other settings")
    launcher: Launcher = setting(
        "none", "Launcher of the training", details='"accelerate" starts several processes, by default one per GPU.'
    )
    num_processes: int | None = setting(None, "Processes per machine", default_text="one per GPU", example=8, ge=1)
    num_machines: int | None = setting(
        None,
        "Number of machines",
        default_text="from torchrun, Slurm or Kubernetes",
        details="Run the same command on each machine, with the run on a shared file system.",
        example=2,
        ge=1,
    )
    machine_rank: int | None = setting(
        None, "Rank of this machine, from 0", default_text="from torchrun, Slurm or Kubernetes", example=0, ge=0
    )
    main_process_address: str | None = setting(
        None,
        "Address of the first machine, HOST[:PORT]",
        default_text="from torchrun, Slurm or Kubernetes",
        example="node-0:29500",
    )
    sharding: Sharding = setting("fsdp", "Distribution of the weights over the processes")
    trl: dict[str, Any] = setting(
        {},
        "Further options of TRL's configuration for the method, by name",
        details='report_to = "tensorboard" (or "trackio", "wandb") also sends the training curves there.',
        example={"warmup_steps": 20},
        resume="retrain",
    )


class EvaluateConfig(ConfigSection):
    """Comparison of the trained model with its reference."""

    sources: OneOrMore[str] = setting(
        [],
        "Evaluation prompts, as in `prompts.sources`",
        default_text="the held-out prompts",
        example=["fresh.jsonl"],
    )
    limit: int | None = setting(None, "Maximum number of evaluation prompts", example=500, ge=1)
    judges: OneOrMore[str] = setting(
        [],
        "Judges of the evaluation: NAME or NAME@MODEL",
        default_text="the judges that labeled the pairs",
        details="A judge of another model family is stronger evidence.",
        example=["helpful"],
    )
    model: str | None = setting(None, "Judge model of the evaluation", example="Qwen/Qwen3-32B")
    base_url: OneOrMore[Url] = setting(
        [],
        "OpenAI-compatible server of the judge model",
        details="By default, a model that labeled the pairs is asked at the same server; rlaif starts vLLM for another "
        "one.",
        example=["http://127.0.0.1:8001/v1"],
    )
    kl_samples: int = setting(
        64,
        "Answers of the trained model used to estimate its KL divergence from the reference; 0 skips the estimate",
        details="The estimate is unbiased if `sampler.temperature` and `sampler.top_p` are 1.",
        ge=0,
    )


class IterationConfig(ConfigSection):
    """Position of this run in a series of iterations. `rlaif init NEXT --from RUN` fills it in."""

    previous_run: str | None = setting(
        None, "Path from this run to the run whose trained model is the policy here", example="../first"
    )


class ClientConfig(ConfigSection):
    """Requests to models: rate limits, time limits and budget."""

    concurrency: int = setting(
        64,
        "Maximum requests in flight, over all endpoints and replicas",
        details="About 64 per GPU that answers.",
        ge=1,
        le=4096,
    )
    use_batch_api: bool = setting(False, "Use the provider's batch API: half the price, up to a day")
    requests_per_minute: float | None = setting(None, "Requests per minute and endpoint", example=500, gt=0)
    tokens_per_minute: float | None = setting(None, "Tokens per minute and endpoint", example=200000, gt=0)
    timeout_s: float = setting(
        600,
        "Time without progress after which a server counts as hung, in seconds",
        details="vLLM makes progress as long as its metrics show new tokens. Other servers get more time if their "
        "recent answers were slow. After each time-out, fewer requests are sent at once.",
        gt=0,
    )
    request_deadline_s: float = setting(
        3600,
        "Maximum time for a request with all its attempts, in seconds",
        details="For a vLLM that rlaif runs, it applies after the first attempt.",
        gt=0,
    )
    max_attempts: int = setting(6, "Maximum attempts per request", ge=1, le=50)
    max_failures: int = setting(0, "Failed requests that are tolerated", details="With more, the exit code is 3.", ge=0)
    budget_usd: float | None = setting(
        None, "Budget in US dollars: no requests are sent once it is spent", example=20.0, gt=0
    )
    server_python: str | None = setting(
        None,
        "Python of another environment to run vLLM with",
        details="For a trainer and a server that need different packages.",
        example="/opt/vllm/bin/python",
    )
    server_start_timeout_s: float = setting(1800, "Maximum time for vLLM to start, in seconds", gt=0)


class ClusterConfig(ConfigSection):
    """Machines on which rlaif starts models without a `base_url`."""

    backend: Backend = setting(
        "local",
        "Backend that runs the models: this machine or a Ray cluster",
        details='"ray" uses the cluster that RAY_ADDRESS names, or starts a local one for the duration of the '
        "command. It needs the extra `cluster`. `rlaif serve RUN` keeps models running between commands.",
    )
    replicas: int | None = setting(
        None,
        "Replicas per model",
        default_text="as many as the GPUs allow",
        details="Each takes tensor_parallel_size GPUs.",
        example=2,
        ge=1,
    )
    max_replicas: int | None = setting(
        None,
        "Maximum replicas per model; the number then follows the load",
        details="The minimum is `replicas`, or 1.",
        example=8,
        ge=1,
    )
    cpus: float = setting(1, "CPUs per replica", gt=0)

    @model_validator(mode="after")
    def _check_replica_bounds(self) -> ClusterConfig:
        if self.replicas and self.max_replicas and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas ({self.max_replicas}) is less than replicas ({self.replicas})")
        return self


class RunConfig(ConfigSection):
    """`rlaif run`: all stages as one job. The earlier of `until` and `max_duration` is the deadline."""

    until: TimeOfDay | None = setting(None, "Deadline: no new stage starts after this time of day", example="07:00")
    max_duration: Duration | None = setting(None, "Deadline as a duration from the start", example="8h")
    train: bool = setting(False, "Train at the end")
    evaluate: bool = setting(False, "Compare the trained model with its reference at the end")
    pilot_prompts: int = setting(
        64, "Prompts that are generated and judged first, to estimate time, tokens and cost; 0 for none", ge=0
    )
    train_fraction: float = setting(
        0.25,
        "Fraction of the time that is reserved for training, if not everything fits before the deadline",
        ge=0,
        lt=1,
    )
    min_free_disk_gb: float = setting(2.0, "Free disk space required at the start, in GB", ge=0)
    # The address of a webhook is often a secret, so it is not written into the manifest.
    notify_url: str | None = setting(
        None,
        "Webhook for the notification when the run ends",
        details='The notification is one line, POSTed as {"text": "..."}.',
        example="https://hooks.example.org/...",
        exclude=True,
        repr=False,
    )
    notify_command: str | None = setting(
        None,
        "Command for the notification when the run ends",
        details="It gets the notification as its last argument.",
        example="notify-send rlaif",
    )


class Config(ConfigSection):
    """The resolved settings of a run. Stages read the policies and judges from :meth:`policies_resolved` and
    :meth:`panel_members`.
    """

    seed: int = setting(0, "Random seed", resume="fixed")
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
            raise ValueError("set the policy either in sampler.model or in [[policies]], not both")
        return self

    def policies_resolved(self) -> list[PolicyConfig]:
        """Return the policies: ``[[policies]]``, or each of ``sampler.model`` at ``sampler.base_url``.

        Raises :class:`UsageError` if there is none.
        """
        if self.policies:
            return self.policies
        if not self.sampler.model:
            raise UsageError("no policy model is set", hint="Pass --model NAME or set sampler.model in rlaif.toml.")
        return [PolicyConfig(model=name, base_url=self.sampler.base_url) for name in self.sampler.model]

    def panel_members(self) -> list[PanelMemberConfig]:
        """Return the judges on the panel: ``[[panel]]``, or each of ``judge.panel`` (``NAME`` or ``NAME@MODEL``).

        Checks are not on the panel: they run on every prompt that has them. With ``check`` alone no model is asked.
        Raises :class:`UsageError` if a judge has no model or there is none.
        """
        if self.panel:
            return self.panel
        members = []
        for spec in self.judge.panel:
            if spec == CHECK_JUDGE:
                continue
            name, _, model = spec.partition("@")
            model = model or self.judge.model or ""
            if not name:
                raise UsageError(f"{spec!r} has no judge name", hint="Pass --judge NAME or --judge NAME@MODEL.")
            if not model:
                raise UsageError(
                    f"judge {name!r} has no model",
                    hint="Pass --model NAME (for every judge) or --judge NAME@MODEL, or set judge.model in rlaif.toml.",
                )
            members.append(PanelMemberConfig(name=name, model=model, base_url=self.judge.base_url))
        if not members and CHECK_JUDGE not in self.judge.panel:
            raise UsageError("no judge is set", hint="Pass --judge NAME. `rlaif judges list` shows the names.")
        return members
