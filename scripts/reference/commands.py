"""docs/reference/commands.md: every command with its arguments, options and examples."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from typer.models import ArgumentInfo, OptionInfo

from rlaif.cli.app import app
from rlaif.cli.examples import EXAMPLES
from scripts.reference.markdown import page, table

INTRODUCTION = """\
Every command can be rerun: it resumes where it stopped. `--help` shows the same texts. Options that set a setting
override `RUN/rlaif.toml` for this call; [config.md](config.md) explains the settings. Results go to stdout, progress
and log lines to stderr. For exit codes see [exit-codes.md](exit-codes.md).

`rlaif --version` prints the version. `rlaif --verbose COMMAND` shows the traceback of an error."""
NO_WRAP = "\b"
TYPE_NAMES: dict[Any, str] = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}


@dataclass(frozen=True)
class Parameter:
    """A parameter of a command, as its function declares it."""

    name: str
    kind: Any
    default: Any
    info: Any

    @property
    def is_argument(self) -> bool:
        return isinstance(self.info, ArgumentInfo)

    @property
    def value(self) -> str:
        """The placeholder of its value; empty for a flag without one."""
        if self.info.metavar:
            return str(self.info.metavar)
        if get_origin(self.kind) is Literal:
            return "|".join(get_args(self.kind))
        return "" if self.kind is bool else TYPE_NAMES[self.kind]

    @property
    def help(self) -> str:
        shown = self.info.show_default and self.default not in (None, False, inspect.Parameter.empty)
        return f"{self.info.help or ''} [default: {self.default}]".strip() if shown else self.info.help or ""

    @property
    def usage(self) -> str:
        if self.is_argument:
            name = self.value if self.info.metavar else self.name.upper()
            return name if self.default is inspect.Parameter.empty or name.startswith("[") else f"[{name}]"
        return ""

    @property
    def flags(self) -> str:
        # Inside Annotated, the first positional argument of typer.Option is a name, although it is called `default`.
        first = [self.info.default] if isinstance(self.info.default, str) else []
        return ", ".join([*first, *(self.info.param_decls or [])] or [f"--{self.name.replace('_', '-')}"])


def render() -> str:
    """Return the page."""
    parts = [INTRODUCTION]
    listed = list(commands())
    parts.append(
        table(
            ["command", ""],
            [(f"[`rlaif {name}`](#rlaif-{name.replace(' ', '-')})", summary(function)) for name, function in listed],
        )
    )
    for name, function in listed:
        parts += [f"## `rlaif {name}`", *help_paragraphs(function)]
        members = list(parameters(function))
        arguments = [member for member in members if member.is_argument]
        options = [member for member in members if not member.is_argument]
        usage = " ".join(["rlaif", name, *(member.usage for member in arguments), *(["[OPTIONS]"] if options else [])])
        parts.append(f"```\n{usage}\n```")
        if arguments:
            parts.append(
                table(["argument", ""], [(f"`{member.usage.strip('[]')}`", member.help) for member in arguments])
            )
        if options:
            parts.append(table(["option", "meaning", "setting"], map(_option_row, options)))
        parts.append("```sh\n" + "\n".join(EXAMPLES[name]) + "\n```")
    return page("Commands", *parts)


def commands() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield the name and function of each command, in the order of `rlaif --help`."""
    for command in app.registered_commands:
        assert command.callback
        yield command.name or command.callback.__name__, command.callback
    for group in app.registered_groups:
        assert group.typer_instance
        for command in group.typer_instance.registered_commands:
            assert command.callback
            yield f"{group.name} {command.name}", command.callback


def summary(function: Callable[..., Any]) -> str:
    """Return the first paragraph of the command's help."""
    return help_paragraphs(function)[0]


def help_paragraphs(function: Callable[..., Any]) -> list[str]:
    """Return the command's help. A paragraph that is not to be wrapped (it starts with a backspace) is a code block."""
    paragraphs = (inspect.getdoc(function) or "").split("\n\n")
    return [
        f"```\n{paragraph.removeprefix(NO_WRAP).strip(chr(10))}\n```"
        if paragraph.startswith(NO_WRAP)
        else " ".join(paragraph.split())
        for paragraph in paragraphs
    ]


def parameters(function: Callable[..., Any]) -> Iterator[Parameter]:
    """Yield the parameters of a command."""
    signature = inspect.signature(function)
    for name, annotated in get_type_hints(function, include_extras=True).items():
        if name == "return":
            continue
        kind, *metadata = (
            (annotated.__origin__, *annotated.__metadata__)
            if hasattr(annotated, "__metadata__")
            else (annotated, ArgumentInfo())
        )
        if get_origin(kind) in (Union, types.UnionType):
            kind = next(part for part in get_args(kind) if part is not type(None))
        if get_origin(kind) is list:
            kind = get_args(kind)[0]
        info = next(part for part in metadata if isinstance(part, ArgumentInfo | OptionInfo))
        yield Parameter(name, kind, signature.parameters[name].default, info)


def _option_row(option: Parameter) -> list[str]:
    setting = getattr(option.info, "setting", None)
    flags = f"`{option.flags} {option.value}`" if option.value else f"`{option.flags}`"
    section = setting.rpartition(".")[0] if setting else ""
    link = f"[`{setting}`](config.md{f'#{section}' if section else ''})" if setting else ""
    return [flags, option.help, link]
