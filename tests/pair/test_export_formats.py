"""Every export loads in the target trainer and counts the rows that it cannot represent."""

from __future__ import annotations

import argparse
import ast
import json
import shlex
from datetime import datetime
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow
import pyarrow.parquet
import pytest

from rlaif.errors import RunError, UsageError
from rlaif.pair.export_formats import BATCH_ROWS, FORMATS, export_dataset
from tests.conftest import needs_tools

Row = dict[str, Any]
TURN = pl.Struct({"role": pl.String, "content": pl.String})
SCHEMA = {
    "prompt": pl.List(TURN),
    "chosen": pl.List(TURN),
    "rejected": pl.List(TURN),
    "pair_id": pl.String,
    "prompt_id": pl.String,
    "label_source": pl.String,
    "confidence": pl.Float64,
    "rating_margin": pl.Float64,
    "chosen_model": pl.String,
    "rejected_model": pl.String,
    "tags": pl.List(pl.String),
}
TOOLS = json.dumps([{"type": "function", "function": {"name": "add", "parameters": {"properties": {}}}}])


def turn(role: str, content: str | None, **more: Any) -> Row:
    return {"role": role, "content": content, **more}


def row(name: str, prompt: list[Row], **more: Any) -> Row:
    return {
        "prompt": prompt,
        "chosen": [turn("assistant", f"Good {name} 👍\r\n- a\u2028b")],
        "rejected": [turn("assistant", f"Bad {name}")],
        "pair_id": f"pair-{name}",
        "prompt_id": f"prompt-{name}",
        "label_source": "judge",
        "confidence": 0.9,
        "rating_margin": None,
        "chosen_model": "m1",
        "rejected_model": "m2",
        "tags": ["x"],
        **more,
    }


SINGLE = row("single", [turn("user", "Hi?")])
MULTI = row("multi", [turn("system", "Be brief."), turn("user", "1"), turn("assistant", "2"), turn("user", "3")])
HELD = row("held", [turn("user", "Held out?")])


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def dataset(path: Path, train: list[Row], test: list[Row] | None = None, **columns: Any) -> Path:
    path.mkdir(exist_ok=True)
    for name, rows in (("train", train), ("test", test)):
        if rows is not None:
            pl.DataFrame(rows, schema={**SCHEMA, **columns}).write_parquet(path / f"{name}.parquet")
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return dataset(tmp_path / "dataset", [SINGLE, MULTI], [HELD])


def load(output: Path) -> dict[str, list[Row]]:
    from datasets import load_dataset

    return {name: split.to_list() for name, split in load_dataset(str(output)).items()}


def load_file(path: Path) -> list[Row]:
    """Load a local file as the trainers do: by type, with one split named train."""
    from datasets import load_dataset

    kind = {".jsonl": "json", ".parquet": "parquet"}[path.suffix]
    rows: list[Row] = load_dataset(kind, data_files=str(path), split="train").to_list()
    return rows


def test_trl_is_the_dataset_unchanged(source: Path, tmp_path: Path) -> None:
    written = export_dataset(source, "trl", tmp_path / "out")
    assert [path.name for path in written] == ["README.md", "test.parquet", "train.parquet"]
    assert load(tmp_path / "out") == {"train": [SINGLE, MULTI], "test": [HELD]}
    assert (tmp_path / "out/train.parquet").read_bytes() == (source / "train.parquet").read_bytes()


def test_h4_has_whole_conversations(source: Path, tmp_path: Path) -> None:
    export_dataset(source, "h4", tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert list(loaded) == ["train_prefs", "test_prefs"]
    for result, expected, user_text in zip(
        loaded["train_prefs"] + loaded["test_prefs"], (SINGLE, MULTI, HELD), ("Hi?", "1", "Held out?"), strict=True
    ):
        assert result == {
            "prompt": user_text,
            "prompt_id": expected["prompt_id"],
            "chosen": expected["prompt"] + expected["chosen"],
            "rejected": expected["prompt"] + expected["rejected"],
            "messages": expected["prompt"] + expected["chosen"],
            "pair_id": expected["pair_id"],
            "label_source": "judge",
            "confidence": 0.9,
        }


def test_llama_factory_is_declared_and_ranked(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_dataset(source, "llama-factory", out)
    declared = json.loads((out / "dataset_info.json").read_text(encoding="ascii"))
    columns = {name: name for name in ("chosen", "rejected", "system", "tools")}
    assert declared["rlaif_train"] == {
        "file_name": "rlaif_train.jsonl",
        "formatting": "sharegpt",
        "ranking": True,
        "columns": {"messages": "conversations", **columns},
    }
    assert set(declared) == {"rlaif_train", "rlaif_test"}
    single, multi = load_file(out / declared["rlaif_train"]["file_name"])
    assert single == {
        "conversations": [{"from": "human", "value": "Hi?"}],
        "chosen": {"from": "gpt", "value": SINGLE["chosen"][0]["content"]},
        "rejected": {"from": "gpt", "value": "Bad single"},
        "system": "",
        "tools": "",
        "pair_id": "pair-single",
    }
    assert multi["system"] == "Be brief."
    assert [message["from"] for message in multi["conversations"]] == ["human", "gpt", "human"]
    assert [message["value"] for message in multi["conversations"]] == ["1", "2", "3"]
    assert load(out)["test"] == load_file(out / "rlaif_test.jsonl")


def test_axolotl_comes_with_its_settings(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_dataset(source, "axolotl", out)
    assert load_file(out / "train.jsonl")[1] == {
        "messages": MULTI["prompt"],
        "chosen": MULTI["chosen"][0],
        "rejected": MULTI["rejected"][0],
        "pair_id": "pair-multi",
    }
    assert load(out) == {name: load_file(out / f"{name}.jsonl") for name in ("train", "test")}
    yaml = pytest.importorskip("yaml")
    settings = yaml.safe_load((out / "axolotl.yaml").read_text(encoding="utf-8"))
    assert (settings["rl"], settings["val_set_size"]) == ("dpo", 0)
    for name, key in (("train", "datasets"), ("test", "test_datasets")):
        (entry,) = settings[key]
        assert entry["path"] == str(out.resolve() / f"{name}.jsonl")
        assert (entry["type"], entry["ds_type"], entry["split"]) == ("chat_template.default", "json", "train")
        loaded = load_file(Path(entry["path"]))[0]
        assert {entry["field_messages"], entry["field_chosen"], entry["field_rejected"]} < set(loaded)
        assert loaded[entry["field_messages"]][0].keys() == entry["message_property_mappings"].keys()


def test_axolotl_answers_lose_whitespace_at_both_ends(tmp_path: Path) -> None:
    answer = [turn("assistant", " \n indented\n  code \n")]
    source = dataset(tmp_path / "dataset", [{**SINGLE, "chosen": answer}])
    export_dataset(source, "axolotl", tmp_path / "out")
    assert load_file(tmp_path / "out/train.jsonl")[0]["chosen"]["content"] == "indented\n  code"


def test_openrlhf_has_whole_conversations_and_no_margin(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_dataset(source, "openrlhf", out)
    for result, expected in zip(load_file(out / "train.jsonl"), (SINGLE, MULTI), strict=True):
        assert result == {
            "chosen": expected["prompt"] + expected["chosen"],
            "rejected": expected["prompt"] + expected["rejected"],
            "pair_id": expected["pair_id"],
        }
    assert f"--eval.dataset {out}/test.jsonl --eval.split train" in (out / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("trainer", ["train_dpo", "train_rm"])
def test_openrlhf_accepts_the_flags_of_the_readme(trainer: str, source: Path, tmp_path: Path) -> None:
    """Its parser is built when the module runs, after heavy imports, so the test builds it from the same lines."""
    tools = needs_tools("openrlhf").parent.parent
    (source_file,) = tools.glob(f"lib/python*/site-packages/openrlhf/cli/{trainer}.py")
    calls = [
        node
        for node in ast.walk(ast.parse(source_file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Expr) and ast.unparse(node).startswith("parser.add_argument(")
    ]
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    for call in calls:
        exec(ast.unparse(call), {"parser": parser, "datetime": datetime})  # one default is the time

    export_dataset(source, "openrlhf", tmp_path / "out, the first")
    readme = (tmp_path / "out, the first" / "README.md").read_text(encoding="utf-8")
    line = shlex.split(readme.partition("```sh")[2].partition("```")[0].replace("\\\n", " "))
    assert line[:3] == ["deepspeed", "--module", "openrlhf.cli.train_dpo"]
    parsed, unknown = parser.parse_known_args(line[3:])
    assert unknown == []
    options = vars(parsed)
    assert Path(options["data.dataset"]).exists()
    assert Path(options["eval.dataset"]).exists()
    rows = load_file(Path(options["data.dataset"]))
    assert {options["data.chosen_key"], options["data.rejected_key"]} <= set(rows[0])
    assert options["data.apply_chat_template"] is True
    assert options["data.prompt_key"] is None
    assert parser.parse_known_args(["--data.choosen_key", "chosen"])[1]  # that this can fail


# Tools

CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
FUNCTION = pl.Struct({"name": pl.String, "arguments": pl.String})
CALLS = pl.List(pl.Struct({"id": pl.String, "type": pl.String, "function": FUNCTION}))
TURN_WITH_CALLS = pl.Struct({"role": pl.String, "content": pl.String, "tool_calls": CALLS, "tool_call_id": pl.String})


def with_tools(path: Path) -> Path:
    plain = {"tool_calls": None, "tool_call_id": None}
    question = [turn("user", "1+1?", **plain)]
    called = [
        *question,
        turn("assistant", "", tool_calls=[CALL], tool_call_id=None),
        turn("tool", "2", tool_calls=None, tool_call_id="1"),
    ]
    rows = [{**row("tools", question), "tools": TOOLS}, {**row("called", called), "tools": TOOLS}]
    return dataset(
        path,
        [{**row("none", [turn("user", "Hi?", **plain)]), "tools": None}, *rows],
        prompt=pl.List(TURN_WITH_CALLS),
        tools=pl.String,
    )


def test_tools_are_kept_if_the_trainer_reads_them(tmp_path: Path) -> None:
    source = with_tools(tmp_path / "dataset")
    for name in ("trl", "h4"):
        export_dataset(source, name, tmp_path / name)
        (rows,) = load(tmp_path / name).values()
        assert [loaded["tools"] for loaded in rows] == [None, TOOLS, TOOLS]
        turns = rows[2]["prompt"] if name == "trl" else rows[2]["chosen"][:-1]
        assert turns[1]["tool_calls"] == [CALL]
        assert [message["role"] for message in turns] == ["user", "assistant", "tool"]
    export_dataset(source, "llama-factory", tmp_path / "lf")
    rows = load_file(tmp_path / "lf/rlaif_train.jsonl")
    assert [loaded["tools"] for loaded in rows] == ["", TOOLS, TOOLS]
    conversation = rows[2]["conversations"]
    assert [part["from"] for part in conversation] == ["human", "function_call", "observation"]
    assert json.loads(conversation[1]["value"]) == [{"name": "add", "arguments": {"a": 1}}]


@pytest.mark.parametrize("name", ["axolotl", "openrlhf"])
def test_rows_that_a_trainer_cannot_represent_are_dropped_and_counted(tmp_path: Path, name: str) -> None:
    export_dataset(with_tools(tmp_path / "dataset"), name, tmp_path / "out")
    rows = load_file(tmp_path / "out/train.jsonl")
    assert [loaded["pair_id"] for loaded in rows] == ["pair-none", "pair-tools"]
    assert all("tools" not in loaded for loaded in rows)
    readme = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert "2 train rows." in readme
    assert "- Dropped: 1 rows with tool calls in a turn." in readme
    assert f"- 1 rows have tools, which {name} does not add" in readme


def test_llama_factory_exports_no_rows_that_it_would_drop(tmp_path: Path) -> None:
    user, assistant, system = turn("user", "u"), turn("assistant", "a"), turn("system", "s")
    call = turn("assistant", "Let me see.")
    prompts = [[user, user], [user, assistant], [user, system, user], [assistant, user], [system, user, call, user]]
    rows = [row(str(number), prompt) for number, prompt in enumerate(prompts)]
    rows.append({**SINGLE, "chosen": [assistant, user, assistant]})
    export_dataset(dataset(tmp_path / "dataset", rows, [rows[0]]), "llama-factory", tmp_path / "out")
    assert [loaded["pair_id"] for loaded in load_file(tmp_path / "out/rlaif_train.jsonl")] == ["pair-4"]
    readme = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert "Dropped: 5 rows with turns that do not alternate." in readme
    assert "Dropped: 1 rows with an answer of more than one turn." in readme
    # An empty split is not declared.
    assert set(json.loads((tmp_path / "out/dataset_info.json").read_bytes())) == {"rlaif_train"}
    assert set(load(tmp_path / "out")) == {"train"}


def test_an_export_without_any_representable_row_is_an_error(tmp_path: Path) -> None:
    source = dataset(tmp_path / "dataset", [row("x", [turn("user", "u"), turn("user", "u")])])
    with pytest.raises(
        UsageError, match="cannot represent any row of this dataset: 1 with turns that do not alternate"
    ):
        export_dataset(source, "llama-factory", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


# Any format


@pytest.mark.parametrize("name", FORMATS)
def test_an_empty_test_split_is_omitted(tmp_path: Path, name: str) -> None:
    source = dataset(tmp_path / "dataset", [SINGLE, MULTI], [])
    written = export_dataset(source, name, tmp_path / "out")
    assert not [path for path in written if "test" in path.name]
    assert [len(rows) for rows in load(tmp_path / "out").values()] == [2]
    for text in (path.read_text(encoding="utf-8") for path in written if path.suffix in (".md", ".yaml")):
        for mention in ("split: test\n", "rlaif_test", "test.jsonl", "test_datasets", '["test"]', "--eval.dataset"):
            assert mention not in text


@pytest.mark.parametrize("name", FORMATS)
def test_a_second_export_replaces_the_first(source: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "new" / "out"
    first = {path: path.read_bytes() for path in export_dataset(source, name, out)}
    (out / "mine.yaml").write_text("keep: me")
    assert {path: path.read_bytes() for path in export_dataset(source, name, out)} == first
    (source / "test.parquet").unlink()
    written = export_dataset(source, name, out)
    assert (out / "mine.yaml").read_text() == "keep: me"
    assert {path for path in out.rglob("*") if path.is_file()} == {*written, out / "mine.yaml"}


@pytest.mark.parametrize("name", FORMATS)
def test_many_rows_in_several_batches(tmp_path: Path, name: str) -> None:
    rows = [row(str(number), [turn("user", f"Question {number}")]) for number in range(2 * BATCH_ROWS + 7)]
    for example in rows[:BATCH_ROWS]:
        example["confidence"] = None
    export_dataset(dataset(tmp_path / "dataset", rows), name, tmp_path / "out")
    (loaded,) = load(tmp_path / "out").values()
    assert [result["pair_id"] for result in loaded] == [expected["pair_id"] for expected in rows]


def test_the_readme_shows_how_to_load_the_export(source: Path, tmp_path: Path) -> None:
    texts = {
        "trl": 'rename_column("rating_margin", "margin")',
        "h4": "columns: [chosen, rejected]",
        "llama-factory": "dataset: rlaif_train\neval_dataset: rlaif_test",
        "axolotl": "axolotl.yaml",
        "openrlhf": "--data.chosen_key chosen --data.rejected_key rejected",
    }
    assert set(texts) == set(FORMATS)
    for name, text in texts.items():
        export_dataset(source, name, tmp_path / name)
        readme = (tmp_path / name / "README.md").read_text(encoding="utf-8")
        assert text in readme
        assert "2 train, 1 test rows." in readme


def test_other_files_are_never_overwritten(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds files other than"):
        export_dataset(source, "trl", source)
    export_dataset(source, "trl", tmp_path / "out")
    with pytest.raises(UsageError, match="holds files other than an export as h4"):
        export_dataset(source, "h4", tmp_path / "out")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        export_dataset(source, "trl", tmp_path / "file")


def test_datasets_and_formats_that_cannot_be_exported(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Did you mean 'llama-factory'"):
        export_dataset(source, "llamafactory", tmp_path / "out")
    with pytest.raises(UsageError, match="no dataset yet"):
        export_dataset(tmp_path / "nowhere", "trl", tmp_path / "out")
    with pytest.raises(UsageError, match="no dataset yet"):
        export_dataset(dataset(tmp_path / "empty", [], [HELD]), "trl", tmp_path / "out")
    (source / "train.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(UsageError, match="cannot be read as Parquet"):
        export_dataset(source, "trl", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failed_export_keeps_the_previous_one(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = {path: path.read_bytes() for path in export_dataset(source, "h4", tmp_path / "out")}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pyarrow.parquet.ParquetWriter, "write_table", full)
    with pytest.raises(RunError, match="cannot be written: No space left"):
        export_dataset(source, "h4", tmp_path / "out")
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == first
    assert not list((tmp_path / "out").glob(".export*"))
