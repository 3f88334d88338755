"""The generated files are up to date, and what they are generated from is complete."""

from __future__ import annotations

import inspect
import json
import re
import tomllib
from typing import Any, Literal, get_args, get_origin

import jsonschema
import pytest
from typer.testing import CliRunner

from rlaif.cli.app import app
from rlaif.config.catalog import Setting, settings
from rlaif.config.models import TrainConfig
from rlaif.config.schema import json_schema
from rlaif.config.template import render_template
from rlaif.errors import RlaifError
from rlaif.train import trl_config
from scripts.generate_reference import COMMAND, generate
from scripts.reference import commands, exit_codes
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def generated() -> dict[str, str]:
    return generate()


def test_generated_files_are_up_to_date(generated: dict[str, str]) -> None:
    stale = [
        name for name, text in generated.items() if not (ROOT / name).exists() or (ROOT / name).read_text() != text
    ]
    assert not stale, f"these files are stale: {', '.join(stale)}\n  hint: Run `{COMMAND}`."


def test_links_between_the_pages_work(generated: dict[str, str]) -> None:
    pages = {name.rpartition("/")[2]: text for name, text in generated.items() if name.endswith(".md")}
    anchors = {
        name: {
            re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-")
            for heading in re.findall("(?m)^#+ (.*)$", text)
        }
        for name, text in pages.items()
    }
    for name, text in pages.items():
        for target, anchor in re.findall(r"\]\(([\w.-]*)(?:#([\w-]+))?\)", text):
            assert (target or name) in pages
            assert not anchor or anchor in anchors[target or name], f"{name}: {target}#{anchor}"


@pytest.mark.parametrize("setting", list(settings()), ids=lambda setting: setting.name)
def test_a_setting_is_described(setting: Setting) -> None:
    """A noun phrase without a full stop, and something for the template to show."""
    assert setting.description
    assert not setting.description.endswith(".")
    assert setting.description[0].isupper() or setting.description.startswith("vLLM")
    assert not setting.details or setting.details.endswith(".")
    assert setting.shown is not None or setting.starter is not None


OPTIONS = [
    (f"rlaif {name} {parameter.flags}", parameter, parameter.info.setting)
    for name, function in commands.commands()
    for parameter in commands.parameters(function)
    if hasattr(parameter.info, "setting")
]
BY_NAME = {setting.name: setting for setting in settings()}


@pytest.mark.parametrize(
    ("parameter", "name"), [option[1:] for option in OPTIONS], ids=[option[0] for option in OPTIONS]
)
def test_an_option_has_the_type_of_its_setting(parameter: commands.Parameter, name: str) -> None:
    setting = BY_NAME[name]
    if get_origin(parameter.kind) is Literal:
        assert get_args(parameter.kind) == setting.choices
    else:
        kind: Any = setting.annotation if not setting.is_sequence else str
        assert parameter.value in ("", commands.TYPE_NAMES.get(kind), parameter.info.metavar)


@pytest.mark.parametrize(("name", "function"), list(commands.commands()), ids=[name for name, _ in commands.commands()])
def test_a_command_passes_every_option_to_its_setting(name: str, function: Any) -> None:
    """In the dictionary of settings that it passes on, each key is the setting of the option that is its value."""
    options = {
        parameter.name: parameter.info.setting
        for parameter in commands.parameters(function)
        if hasattr(parameter.info, "setting")
    }
    shared = {"concurrency", "seed", "max_failures", "budget_usd"}  # passed on by client_flags
    source = inspect.getsource(function)
    passed = dict(re.findall(r'"([a-z]+\.\w+|seed)": (?:str\()?(\w+)', source))
    for setting, parameter in passed.items():
        if parameter in options:
            assert options[parameter] == setting, parameter
    missing = set(options) - set(passed.values()) - (shared if "client_flags(" in source else set())
    assert missing <= {"annotators", "on_bad_row"}, f"{name} ignores {missing}"  # `review` checks these itself


def test_every_exit_code_of_an_error_is_explained() -> None:
    def codes(error: type[RlaifError]) -> set[int]:
        return {error.exit_code}.union(*(codes(subclass) for subclass in error.__subclasses__()))

    assert codes(RlaifError) | {0, 130} == set(exit_codes.CODES)


def test_the_schema_accepts_the_template_and_rejects_errors() -> None:
    schema = json_schema()
    jsonschema.Draft7Validator.check_schema(schema)
    validator = jsonschema.Draft7Validator(schema)
    assert validator.is_valid(tomllib.loads(render_template({})))
    for text in ('[sampler]\nmodel = "one"', "[judge]\nlimit = 5", '[review]\nannotators = "ada, bob"'):
        assert validator.is_valid(tomllib.loads(text)), text
    for text in (
        "[sampler]\ntemprature = 1",
        "[sampler]\nn = 0",
        '[prompts]\non_bad_row = "stopp"',
        '[[panel]]\nname = "a"',
    ):
        assert not validator.is_valid(tomllib.loads(text)), text


def test_the_schema_describes_every_setting() -> None:
    definitions = json_schema()["definitions"]
    for setting in settings():
        if setting.section:
            described = definitions[setting.section.model.__name__]["properties"][setting.key]
            assert described["description"].startswith(setting.description)


OTHER_TRAIN_VALUES: dict[str, Any] = {
    "method": "sft", "output": "o", "lora": False, "qlora": True, "lora_r": 8, "lora_alpha": 8, "merge": False,
    "beta": 0.2, "loss": ["ipo"], "reward_model": "r", "learning_rate": 1e-3, "epochs": 2.0, "max_steps": 5,
    "batch_size": 4, "per_device_batch_size": 1, "max_length": 512, "dtype": "bfloat16", "save_steps": 1,
    "overwrite": True, "launcher": "accelerate", "num_processes": 1, "num_machines": 1, "machine_rank": 0,
    "main_process_address": "h", "sharding": "ddp", "trl": {"warmup_steps": 3},
}  # fmt: skip


def test_the_resume_rule_of_a_training_setting_is_what_training_does() -> None:
    """A setting that is part of the fingerprint needs `overwrite`, unless it may grow; the others may change."""
    pytest.importorskip("torch")
    rules = {
        setting.key: setting.resume for setting in settings() if setting.section and setting.section.name == "train"
    }

    def fingerprint(**values: Any) -> dict[str, Any]:
        return trl_config.training_fingerprint(TrainConfig(**values), model="m", seed=0, dataset="d", rows={})

    # The model is a separate argument.
    assert OTHER_TRAIN_VALUES.keys() | {"model"} == rules.keys()
    assert rules["model"] == "retrain"
    for key, value in OTHER_TRAIN_VALUES.items():
        assert (fingerprint(**{key: value}) != fingerprint(dtype="float32" if key == "dtype" else "auto")) == (
            rules[key] != "free"
        ), key
    assert {key for key, rule in rules.items() if rule == "may_grow"} == set(trl_config.MAY_GROW)


def test_config_schema_prints_the_schema() -> None:
    result = CliRunner().invoke(app, ["config", "schema"])
    assert result.exit_code == 0
    assert json.loads(result.stdout) == json_schema()
