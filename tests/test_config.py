"""Settings: their sources and precedence, error messages, the template, and the rules for resuming a run."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from rlaif import records
from rlaif.config.loader import load
from rlaif.config.models import Config
from rlaif.config.resume import RESUME_RULES, check_resume, resume_fields, resume_fields_hash
from rlaif.config.template import render_template
from rlaif.errors import ConfigMismatchError, UsageError


def write(run: Path, text: str, encoding: str = "utf-8") -> Path:
    (run / "rlaif.toml").write_text(text, encoding=encoding)
    return run


def value_of(config: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        config = getattr(config, part)
    return config


# Precedence


@pytest.mark.parametrize(
    ("name", "default", "in_file", "in_environment", "as_flag"),
    [
        ("seed", 0, 1, 2, 3),
        ("sampler.temperature", 1.0, 0.5, 0.25, 0.0),
        ("sampler.send_seed", True, False, True, False),
        ("sampler.model", [], ["a"], ["b", "c"], ["d"]),
        ("prompts.sources", [], ["a.jsonl"], ["b.csv"], ["c.parquet", "everyday"]),
        ("prompts.limit", None, 1, 2, 3),
        ("judge.panel", ["helpful", "quality"], ["x"], ["y", "z"], ["helpful"]),
        ("judge.strategy", "auto", "rate-only", "round-robin", "rate-then-compare"),
        ("train.loss", [], ["ipo"], ["robust"], ["sigmoid", "sft"]),
        ("client.budget_usd", None, 1.0, 2.0, 3.0),
    ],
)
def test_flags_override_environment_overrides_file_overrides_default(
    tmp_path: Path, name: str, default: Any, in_file: Any, in_environment: Any, as_flag: Any
) -> None:
    section, _, field = name.rpartition(".")
    as_toml = {bool: lambda v: str(v).lower()}.get(type(in_file), repr)(in_file)
    text = (f"[{section}]\n" if section else "") + f"{field} = {as_toml}\n"
    as_text = ",".join(in_environment) if isinstance(in_environment, list) else str(in_environment)
    environ = {f"RLAIF_{name.replace('.', '_')}".upper(): as_text}
    empty, filled = tmp_path / "empty", write(tmp_path, text)

    def read(run: Path, flags: dict[str, Any], environ: dict[str, str]) -> Any:
        return value_of(load(run, flags, environ), name)

    assert read(empty, {name: None}, {}) == default
    assert read(filled, {}, {}) == in_file
    assert read(filled, {}, environ) == in_environment
    assert read(empty, {}, environ) == in_environment
    assert read(filled, {name: as_flag}, environ) == as_flag
    assert read(filled, {name: None}, environ) == in_environment
    assert read(filled, {name: []}, environ) == in_environment


def test_environment_lists_are_separated_by_commas_and_empty_variables_are_ignored(tmp_path: Path) -> None:
    environ = {
        "RLAIF_SAMPLER_BASE_URL": " http://a/v1 , http://b/v1",
        "RLAIF_PROMPTS_SOURCES": "",
        "RLAIF_SEED": "",
        "RLAIF_SAMPLER_SYSTEM": "a, b",
    }
    config = load(write(tmp_path, 'seed = 5\n[prompts]\nsources = ["everyday"]\n'), {}, environ)
    assert config.sampler.base_url == ["http://a/v1", "http://b/v1"]
    assert config.prompts.sources == ["everyday"]
    assert config.seed == 5
    assert config.sampler.system == "a, b"


def test_a_single_name_is_a_list_of_one(tmp_path: Path) -> None:
    text = (
        '[prompts]\nsources = "everyday"\n[sampler]\nmodel = "m"\n[judge]\npanel = "helpful"\n'
        'base_url = "http://x/v1"\n'
    )
    config = load(write(tmp_path, text), {}, {})
    assert (config.prompts.sources, config.sampler.model) == (["everyday"], ["m"])
    assert (config.judge.panel, config.judge.base_url) == (["helpful"], ["http://x/v1"])


TABLES = """
[[policies]]
model = "a"
base_url = "http://a/v1"
[[policies]]
model = "b"
[[panel]]
name = "helpful"
model = "j"
weight = 2
"""


@pytest.mark.parametrize("source", ["flag", "environment"])
def test_a_model_from_a_flag_or_the_environment_replaces_the_tables_of_the_file(tmp_path: Path, source: str) -> None:
    """[[policies]] and [[panel]] are part of the file, so whatever overrides the file overrides them too."""
    run = write(tmp_path, TABLES)
    assert [policy.model for policy in load(run, {}, {}).policies_resolved()] == ["a", "b"]
    assert [(member.name, member.weight) for member in load(run, {}, {}).panel_members()] == [("helpful", 2.0)]

    def load_with(name: str, value: str) -> Config:
        flags, environ = (
            ({name: value}, {}) if source == "flag" else ({}, {f"RLAIF_{name}".replace(".", "_").upper(): value})
        )
        return load(run, flags, environ)

    assert [policy.model for policy in load_with("sampler.model", "c").policies_resolved()] == ["c"]
    assert [member.model for member in load_with("judge.model", "k").panel_members()] == ["k", "k"]
    panel = load_with("judge.panel", "quality@k").panel_members()
    assert [(member.name, member.model) for member in panel] == [("quality", "k")]


@pytest.mark.parametrize(("flag", "table"), [("sampler.base_url", "policies"), ("judge.base_url", "panel")])
def test_a_url_that_no_table_would_use_is_rejected(tmp_path: Path, flag: str, table: str) -> None:
    """From any source. If it were ignored, rlaif would start vLLM for the tables without a URL."""
    section, variable = flag.split(".")[0], f"RLAIF_{flag.replace('.', '_').upper()}"
    run, rest = write(tmp_path, TABLES), rf" cannot be combined with \[\[{table}\]\]"
    with pytest.raises(UsageError, match=f"--base-url{rest}"):
        load(run, {flag: ["http://x/v1"]}, {})
    with pytest.raises(UsageError, match=variable + rest):
        load(run, {}, {variable: "http://x/v1"})
    model = {variable.replace("BASE_URL", "MODEL"): "m"}
    assert value_of(load(run, {}, {variable: "http://x/v1", **model}), flag) == ["http://x/v1"]
    run = write(tmp_path, f'{TABLES}[{section}]\nbase_url = "http://x/v1"\n')
    with pytest.raises(UsageError, match=rf"base_url under \[{section}\]{rest}"):
        load(run, {}, {})
    assert value_of(load(run, {}, model), flag) == ["http://x/v1"]
    assert value_of(load(write(tmp_path, f"{TABLES}[{section}]\nbase_url = []\n"), {}, {}), flag) == []


def test_policies_are_set_in_one_place(tmp_path: Path) -> None:
    run = write(tmp_path, '[sampler]\nmodel = "m"\n[[policies]]\nmodel = "n"\n')
    with pytest.raises(UsageError, match=r"sampler\.model.*policies"):
        load(run, {}, {})


def test_a_panel_needs_judges_and_each_judge_needs_a_model(tmp_path: Path) -> None:
    assert [
        member.model
        for member in load(tmp_path, {"judge.panel": ["helpful@x", "quality"], "judge.model": "y"}, {}).panel_members()
    ] == ["x", "y"]
    with pytest.raises(UsageError, match="judge 'helpful' has no model"):
        load(tmp_path, {}, {}).panel_members()
    with pytest.raises(UsageError, match="no judge is set"):
        load(write(tmp_path, "[judge]\npanel = []\n"), {}, {}).panel_members()
    with pytest.raises(UsageError, match="no policy model is set"):
        load(tmp_path, {}, {}).policies_resolved()


# Errors


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[sampler]\ntemprature = 1\n", "unknown key 'sampler.temprature'. Did you mean 'temperature'?"),
        ("[samplr]\nn = 1\n", "unknown key 'samplr'. Did you mean 'sampler'?"),
        ("[[policies]]\nmodle = 'm'\nmodel = 'm'\n", "unknown key 'policies.0.modle'. Did you mean 'model'?"),
        (
            "[[panel]]\nname = 'h'\nmodel = 'm'\n[[panel]]\nname = 'h'\nmodel = 'm'\nwieght = 2\n",
            "unknown key 'panel.1.wieght'. Did you mean 'weight'?",
        ),
        (
            "[pairs]\nzzz = 1\n",
            "unknown key 'pairs.zzz'. Available: human_fraction, max_candidates_per_prompt, max_per_prompt",
        ),
        ("[sampler]\nn = 'four'\n", "sampler.n: Input should be a valid integer"),
        (
            "[sampler]\nn = 0\ntop_p = 2\n",
            "sampler.n: Input should be greater than or equal to 1; sampler.top_p: Input should be less than",
        ),
        ("sampler = 3\n", "sampler: Input should be a valid dictionary"),
        ("policies = 3\n", "policies: Input should be a valid list"),
        ("[sampler]\nmodel = [1]\n", "sampler.model.0: Input should be a valid string"),
        ("[prompts]\non_bad_row = 'stopp'\n", "prompts.on_bad_row: Input should be 'stop' or 'skip'"),
        ("[prompts]\nheldout_fraction = 1\n", "prompts.heldout_fraction: Input should be less than 1"),
        ("[train]\nlora_r = 0\n", "train.lora_r: Input should be greater than or equal to 1"),
        ("[client]\nconcurrency = 1.5\n", "client.concurrency: Input should be a valid integer"),
        ("[client]\nbudget_usd = 0\n", "client.budget_usd: Input should be greater than 0"),
        ("seed = nan\n", "seed: Input should be a finite number"),
        ("[sampler\nn = 1\n", "not valid TOML: "),
        ("[sampler]\nn = 1\nn = 2\n", "not valid TOML: Cannot overwrite a value (at line 3"),
    ],
)
def test_an_error_in_the_file_names_the_file_and_the_setting(tmp_path: Path, text: str, message: str) -> None:
    run = write(tmp_path, text)
    with pytest.raises(UsageError) as raised:
        load(run, {"sampler.temperature": 9.0}, {"RLAIF_SEED": "x"})
    assert str(raised.value).startswith(f"{run / 'rlaif.toml'}: {message}")
    assert raised.value.exit_code == 2


def test_a_file_in_another_encoding_is_reported(tmp_path: Path) -> None:
    run = write(tmp_path, '[sampler]\nsystem = "Grüße"\n', encoding="latin-1")
    with pytest.raises(UsageError, match=r"rlaif\.toml: not valid TOML: .*utf-8"):
        load(run, {}, {})


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    assert load(write(tmp_path, "seed = 7\n", encoding="utf-8-sig"), {}, {}).seed == 7


def test_a_directory_instead_of_the_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "rlaif.toml").mkdir()
    with pytest.raises(UsageError, match=r"rlaif\.toml: cannot be read: Is a directory"):
        load(tmp_path, {}, {})


@pytest.mark.parametrize(
    ("flags", "environ", "message"),
    [
        ({"sampler.n": 1000}, {}, "sampler.n: Input should be less than or equal to 128"),
        ({}, {"RLAIF_SAMPLER_TEMPERATURE": "warm"}, "sampler.temperature: Input should be a valid number"),
        ({}, {"RLAIF_SAMPLER_SEND_SEED": "perhaps"}, "sampler.send_seed: Input should be a valid boolean"),
    ],
)
def test_an_error_in_a_flag_or_variable_is_not_attributed_to_the_file(
    tmp_path: Path, flags: dict[str, Any], environ: dict[str, str], message: str
) -> None:
    with pytest.raises(UsageError) as raised:
        load(write(tmp_path, "seed = 1\n"), flags, environ)
    assert str(raised.value).startswith(f"{tmp_path / 'rlaif.toml'} with flags and environment: {message}")


# The template


def settings_in_template() -> dict[str, tuple[Any, bool]]:
    """Return every setting in the template: dotted name -> (value, whether it is commented)."""
    settings: dict[str, tuple[Any, bool]] = {}
    section = ""
    for line in render_template({}).splitlines():
        if header := re.fullmatch(r"(?:# )?\[+([a-z_.]+)\]+", line):
            section = header[1] + "."
        elif setting := re.fullmatch(r"(# )?([a-z_]+) = (.+)", line):
            assert section + setting[2] not in settings
            settings[section + setting[2]] = (tomllib.loads(f"x = {setting[3]}")["x"], bool(setting[1]))
        else:
            assert not line or line.startswith("# "), f"neither a comment nor a setting: {line!r}"
    return settings


def fields(model: type[BaseModel] = Config, before: str = "") -> dict[str, Any]:
    """Return every setting of Config, down to free-form tables: dotted name -> default."""
    defaults: dict[str, Any] = {}
    for name, info in model.model_fields.items():
        nested = next(records._models_in(info.annotation), None)
        defaults |= (
            fields(nested, f"{before}{name}.")
            if nested
            else {before + name: info.get_default(call_default_factory=True)}
        )
    return defaults


FREE_FORM = ("sampler.vllm", "judge.vllm", "train.trl")  # tables of other programs' settings


def test_the_template_is_valid_as_it_is(tmp_path: Path) -> None:
    config = load(write(tmp_path, render_template({})), {}, {})
    assert config.prompts.sources == ["everyday"]
    assert [policy.model for policy in config.policies_resolved()] == ["demo"]
    assert [member.name for member in config.panel_members()] == ["helpful", "quality"]


def test_the_template_has_every_setting_and_no_other() -> None:
    names = {
        name if name.rpartition(".")[0] not in FREE_FORM else name.rpartition(".")[0] for name in settings_in_template()
    }
    assert names == set(fields())


def test_every_default_in_the_template_is_the_default() -> None:
    """None and an empty list are not shown: the template has an example instead."""
    checked = 0
    for name, default in fields().items():
        if name in FREE_FORM or name.startswith(("policies.", "panel.")) or default in (None, []):
            continue
        value, commented = settings_in_template()[name]
        if commented:
            assert value == default, name
            checked += 1
    assert checked > 30


@pytest.mark.parametrize(
    ("removed", "policies", "judges"),
    [
        ([r"^\[\[policies\]\].*?(?=^\[judge\])", r"^\[\[panel\]\].*?(?=^\[pairs\])"], ["demo"], ["demo", "demo"]),
        ([r'^model = \["demo"\]$.*?^base_url.*?$', r'^panel = .*?^base_url.*?$'], ["Qwen/Qwen3-8B"], ["gpt-4.1-mini"]),
    ],
    ids=["sections", "tables"],
)  # fmt: skip
def test_every_commented_setting_of_the_template_can_be_uncommented(
    tmp_path: Path, removed: list[str], policies: list[str], judges: list[str]
) -> None:
    """A model is set either in its section or in [[policies]] and [[panel]], so one of the two is removed."""
    text = re.sub(r"(?m)^# (?=\[|[a-z_]+ = )", "", render_template({}))
    for part in removed:
        text, count = re.subn(f"(?ms){part}", "", text)
        assert count == 1
    config = load(write(tmp_path, text), {}, {})
    sizes = {"tensor_parallel_size": 2, "data_parallel_size": 4}
    assert config.sampler.vllm == {"max_model_len": 4096, "gpu_memory_utilization": 0.9, **sizes}
    assert config.train.trl == {"warmup_steps": 20}
    assert [policy.model for policy in config.policies_resolved()] == policies
    assert [member.model for member in config.panel_members()] == judges


TEXT = st.text(st.characters(exclude_categories=["Cs"]))
JSON = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
OPTIONS = st.dictionaries(TEXT, JSON, max_size=3)


@settings(max_examples=50, deadline=None)
@given(OPTIONS, OPTIONS, TEXT)
def test_any_value_survives_being_written_into_the_template(
    options: dict[str, Any], panel_options: dict[str, Any], system: str
) -> None:
    panel = [{"name": "helpful", "model": "j", "vllm": panel_options}]
    written = tomllib.loads(render_template({"sampler": {"vllm": options, "system": system}, "panel": panel}))
    assert written["sampler"].get("vllm", {}) == options
    assert written["sampler"]["system"] == system
    assert written["panel"] == panel


# Resuming


def test_every_resume_rule_belongs_to_a_setting() -> None:
    names = set(fields())
    for changes in RESUME_RULES.values():
        for name in changes:
            assert name in names or name in ("policies", "panel"), name
            assert set(changes.values()) == {"fixed", "may_grow"}


def test_a_setting_of_a_stage_is_fixed_unless_it_does_not_affect_answers() -> None:
    """A new setting needs a resume rule, or has to be listed here as one that changes no answer."""
    free = {
        "sampler.base_url",
        "sampler.vllm",
        "prompts.on_bad_row",
        "judge.base_url",
        "judge.vllm",
        "judge.allow_failed_exam",
    }
    resolved = {"sampler.model", "judge.panel", "judge.model"}  # compared as `policies` and `panel`
    for stage, sections in {"generate": ("prompts.", "sampler."), "judge": ("judge.",)}.items():
        of_stage = {name for name in fields() if name.startswith(sections)}
        assert of_stage - free - resolved == {name for name in RESUME_RULES[stage] if "." in name}


def configured(**flags: Any) -> Config:
    return load(
        Path("/nowhere"),
        {
            "sampler.model": ["m"],
            "judge.model": "j",
            **{name.replace("__", "."): value for name, value in flags.items()},
        },
        {},
    )


def test_a_config_mismatch_names_every_setting_that_differs() -> None:
    before = resume_fields("generate", configured())
    now = resume_fields("generate", configured(sampler__temperature=0.5, sampler__model=["n"], prompts__sources=["x"]))
    with pytest.raises(ConfigMismatchError) as raised:
        check_resume("generate", before, now, location="RUN")
    message = str(raised.value)
    assert message.startswith("RUN: stage 'generate' of this run was started with other settings: ")
    for part in (
        "sampler.temperature was 1.0, now 0.5",
        "policies was ['m'], now ['n']",
        "prompts.sources was [], now ['x']",
    ):
        assert part in message
    assert "top_p" not in message
    assert raised.value.exit_code == 2


def test_operational_settings_may_change() -> None:
    """The URL of a model and the rate of requests may change at any time."""
    for stage in RESUME_RULES:
        before = resume_fields(stage, configured())
        after = resume_fields(
            stage,
            configured(
                client__concurrency=3,
                client__timeout_s=5,
                sampler__base_url=["http://x/v1"],
                judge__base_url=["http://y/v1"],
                pairs__human_fraction=0.5,
            ),
        )
        assert before == after


LIMITS = st.none() | st.integers(1, 100)


@given(LIMITS, LIMITS, st.integers(1, 128), st.integers(1, 128))
def test_limit_and_n_may_grow_but_not_shrink(limit: int | None, later: int | None, n: int, more: int) -> None:
    before = resume_fields("generate", configured(prompts__limit=limit, sampler__n=n))
    now = resume_fields("generate", configured(prompts__limit=later, sampler__n=more))
    shrank = [
        name
        for name, smaller in (("prompts.limit", (later or 999) < (limit or 999)), ("sampler.n", more < n))
        if smaller
    ]
    try:
        check_resume("generate", before, now, location="RUN")
    except ConfigMismatchError as error:
        assert shrank
        assert [
            name for name in ("prompts.limit", "sampler.n") if f"{name} may only grow: it was" in error.message
        ] == shrank
    else:
        assert not shrank


def test_resume_fields_survive_the_manifest() -> None:
    """Values that went through JSON are equal to the originals."""
    import orjson

    for stage in RESUME_RULES:
        values = resume_fields(stage, configured(prompts__limit=3))
        reloaded = orjson.loads(orjson.dumps(values))
        assert reloaded == values
        assert resume_fields_hash(reloaded) == resume_fields_hash(values)
        check_resume(stage, reloaded, values, location="RUN")


@pytest.mark.parametrize(
    "flags",
    [
        {"sampler.base_url": ["http://me:hush-hush@host/v1"]},
        {"judge.base_url": ["http://me:hush-hush@host/v1"]},
        {"sampler.vllm": {"api_key": "hush-hush"}},
        {"judge.vllm": {"hf-token": "hush-hush"}},
    ],
)
def test_secrets_are_rejected(tmp_path: Path, flags: dict[str, Any]) -> None:
    """Settings are written into the manifest. The error does not repeat the secret."""
    with pytest.raises(UsageError) as raised:
        load(tmp_path, flags, {})
    assert "hush-hush" not in str(raised.value)
    assert "environment" in str(raised.value) or "file" in str(raised.value)


def test_max_replicas_is_at_least_replicas(tmp_path: Path) -> None:
    (tmp_path / "rlaif.toml").write_text('[cluster]\nbackend = "ray"\nreplicas = 4\nmax_replicas = 2\n')
    with pytest.raises(UsageError, match=r"max_replicas \(2\) is less than replicas \(4\)"):
        load(tmp_path, {}, {})
    (tmp_path / "rlaif.toml").write_text('[cluster]\nbackend = "slurm"\n')
    with pytest.raises(UsageError, match=r"cluster\.backend"):
        load(tmp_path, {}, {})
