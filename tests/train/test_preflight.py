"""Preflight of datasets, with the demo model's tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from rlaif.errors import UsageError
from rlaif.serving.demo_model import demo_checkpoint
from rlaif.train import chat_template, preflight
from rlaif.train.preflight import PreflightFinding

Row = dict[str, Any]


@pytest.fixture(scope="module")
def base_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_checkpoint())


@pytest.fixture
def tokenizer(base_tokenizer: Any) -> Any:
    """The demo tokenizer, whose chat template is restored after each test."""
    template = base_tokenizer.chat_template
    yield base_tokenizer
    base_tokenizer.chat_template = template


def row(index: int = 0, **changes: Any) -> Row:
    return {
        "prompt": [{"role": "user", "content": f"Question {index}?"}],
        "chosen": [{"role": "assistant", "content": f"Good answer {index}."}],
        "rejected": [{"role": "assistant", "content": f"Bad answer, number {index}."}],
        "pair_id": f"pair-{index}",
        "prompt_id": f"prompt-{index}",
        "label_source": "judge",
        "confidence": 0.9,
        "rating_margin": 1.0,
        "chosen_model": "demo",
        "rejected_model": "demo",
        "tags": [],
        **changes,
    }


def answer(text: str | None) -> list[Row]:
    return [{"role": "assistant", "content": text}]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(rows: list[Row] | pl.DataFrame, test: list[Row] | None = None) -> Path:
        dataset = tmp_path / "run" / "dataset"
        dataset.mkdir(parents=True, exist_ok=True)
        frame = rows if isinstance(rows, pl.DataFrame) else pl.DataFrame(rows)
        frame.write_parquet(dataset / "train.parquet")
        if test is not None:
            pl.DataFrame(test).write_parquet(dataset / "test.parquet")
        return dataset

    return write


def finding_named(findings: list[PreflightFinding], name: str) -> PreflightFinding:
    (match,) = (finding for finding in findings if finding.name == name)
    return match


def refused_names(findings: list[PreflightFinding]) -> list[str]:
    return [finding.name for finding in findings if finding.level == "refuse"]


def test_a_valid_dataset_passes(write: Callable[..., Path], tokenizer: Any) -> None:
    dataset = write([row(i) for i in range(100)], [row(200 + i) for i in range(20)])
    findings = preflight.check_dataset(dataset, tokenizer, max_length=256)
    assert [finding for finding in findings if finding.level != "pass"] == []
    assert "100 pairs" in finding_named(findings, "count").message
    preflight.raise_refusals(findings, location=dataset)


def test_the_error_about_a_missing_dataset_names_the_command(tmp_path: Path, tokenizer: Any) -> None:
    dataset = tmp_path / "run" / "dataset"
    findings = preflight.check_dataset(dataset, tokenizer, max_length=256)
    with pytest.raises(UsageError) as caught:
        preflight.raise_refusals(findings, location=dataset)
    assert caught.value.hint == f"Run `rlaif judge {tmp_path / 'run'}`."


def test_a_dataset_without_rows_is_refused(write: Callable[..., Path], tokenizer: Any) -> None:
    dataset = write(pl.DataFrame([row()]).clear())
    finding = finding_named(preflight.check_dataset(dataset, tokenizer, max_length=256), "dataset")
    assert (finding.level, finding.message) == ("refuse", "train.parquet has no rows")
    assert "rlaif status" in (finding.hint or "")


@pytest.mark.parametrize(("held", "level"), [(None, "warn"), (0, "warn"), (19, "warn"), (20, "pass")])
def test_too_few_held_out_pairs_are_a_warning(write: Callable[..., Path], held: int | None, level: str) -> None:
    dataset = write([row()], [row(1 + i) for i in range(held)] if held else None)
    if held == 0:
        pl.DataFrame([row()]).clear().write_parquet(dataset / "test.parquet")
    findings, frame = preflight.check_rows(dataset)
    finding = finding_named(findings, "measured")
    assert finding.level == level
    assert f"{held or 'no'} pairs are held out" in finding.message
    assert frame is not None


def test_an_unreadable_file_is_refused(write: Callable[..., Path]) -> None:
    dataset = write([row()])
    (dataset / "train.parquet").write_bytes(b"PAR1 torn")
    findings, frame = preflight.check_rows(dataset)
    assert frame is None
    assert "train.parquet cannot be read" in finding_named(findings, "dataset").message


def test_the_finding_about_a_renamed_column_names_the_expected_ones(write: Callable[..., Path]) -> None:
    dataset = write(pl.DataFrame([row()]).rename({"chosen": "choosen"}))
    findings, frame = preflight.check_rows(dataset)
    finding = finding_named(findings, "columns")
    assert frame is None
    assert finding.level == "refuse"
    assert "has no column chosen" in finding.message
    assert "choosen" in finding.message
    assert "expected prompt, chosen, rejected" in finding.message
    assert finding.hint == "Did you rename 'choosen'?"


def test_text_instead_of_turns_is_refused(write: Callable[..., Path]) -> None:
    findings, frame = preflight.check_rows(write([row(prompt="Question?")]))
    assert frame is None
    assert "prompt is String" in finding_named(findings, "columns").message


def test_a_whole_conversation_as_chosen_answer_is_refused(write: Callable[..., Path]) -> None:
    conversation = [{"role": "user", "content": "Question 0?"}, {"role": "assistant", "content": "Yes."}]
    findings, _ = preflight.check_rows(write([row(chosen=conversation), row(1)]))
    assert "1 of 2 pairs" in finding_named(findings, "speaker").message
    assert "expected lists of {role, content}" in finding_named(findings, "speaker").message
    assert refused_names(findings) == ["speaker"]


@pytest.mark.parametrize("other", ["Same.", "Same. \n"])
def test_identical_answers_are_refused(write: Callable[..., Path], other: str) -> None:
    findings, _ = preflight.check_rows(write([row(), row(1, chosen=answer("Same."), rejected=answer(other))]))
    finding = finding_named(findings, "identical")
    assert refused_names(findings) == ["identical"]
    assert "1 of 2 pairs" in finding.message
    assert "(pair pair-1)" in finding.message


@pytest.mark.parametrize("nothing", [answer(""), answer(" \n"), answer(None), []])
def test_empty_answers_are_refused(write: Callable[..., Path], nothing: list[Row]) -> None:
    findings, _ = preflight.check_rows(write([row(), row(1, rejected=nothing)]))
    assert refused_names(findings) == ["empty"]
    assert "1 of 2 pairs" in finding_named(findings, "empty").message


def test_a_tool_call_without_text_is_an_answer(write: Callable[..., Path], tokenizer: Any) -> None:
    def call(city: str) -> list[Row]:
        function = {"name": "weather", "arguments": f'{{"city": "{city}"}}'}
        return [{"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": function}]}]

    dataset = write(
        [row(chosen=call("Oslo"), rejected=call("Rome")), row(1, chosen=call("Bern"), rejected=call("Bern"))]
    )
    findings, _ = preflight.check_rows(dataset)
    assert refused_names(findings) == ["identical"]
    assert "pair-1" in finding_named(findings, "identical").message


def test_an_empty_prompt_is_refused(write: Callable[..., Path]) -> None:
    findings, _ = preflight.check_rows(write([row(), row(1, prompt=[])]))
    assert refused_names(findings) == ["prompt"]


def test_the_test_file_is_also_checked(write: Callable[..., Path]) -> None:
    findings, frame = preflight.check_rows(write([row()], [row(1, chosen=answer(""))]))
    assert frame is None
    assert any(finding.message.startswith("test: 1 of 1 pairs") for finding in findings)


def test_few_pairs_are_a_warning_with_their_number(write: Callable[..., Path]) -> None:
    findings, _ = preflight.check_rows(write([row(i) for i in range(99)]))
    finding = finding_named(findings, "count")
    assert (finding.level, "99 pairs" in finding.message) == ("warn", True)


@pytest.mark.parametrize(("longer", "n", "level"), [(15, 20, "warn"), (14, 20, "pass"), (19, 19, "pass")])
def test_a_length_bias_is_a_warning(write: Callable[..., Path], longer: int, n: int, level: str) -> None:
    rows = [row(i, chosen=answer("long " * 9 if i < longer else "s"), rejected=answer("short")) for i in range(n)]
    findings, _ = preflight.check_rows(write(rows))
    finding = finding_named(findings, "skew")
    assert finding.level == level
    assert f"{longer} of {n} pairs" in finding.message


def test_prompts_in_both_splits_are_a_warning(write: Callable[..., Path]) -> None:
    findings, _ = preflight.check_rows(write([row(0), row(1)], [row(1), row(2)]))
    finding = finding_named(findings, "leak")
    assert finding.level == "warn"
    assert "1 of 2 test prompts" in finding.message


def test_a_tokenizer_without_chat_template_is_refused(write: Callable[..., Path], tokenizer: Any) -> None:
    tokenizer.chat_template = None
    findings = preflight.check_dataset(write([row()]), tokenizer, max_length=256)
    assert refused_names(findings) == ["template"]


def test_a_chat_template_that_raises_is_refused(write: Callable[..., Path], tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    system = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    findings = preflight.check_dataset(write([row(), row(1, prompt=system)]), tokenizer, max_length=256)
    finding = finding_named(findings, "template")
    assert finding.level == "refuse"
    assert "cannot render 1 of 2 pairs: no system turn" in finding.message


def test_a_prompt_rendered_differently_before_an_answer_is_a_warning(
    write: Callable[..., Path], tokenizer: Any
) -> None:
    start = "<|im_start|>assistant\n"
    assert tokenizer.chat_template.count(start) == 1
    tokenizer.chat_template = tokenizer.chat_template.replace(start, f"{start}<think>\n")
    findings = preflight.check_dataset(write([row(), row(1)]), tokenizer, max_length=256)
    finding = finding_named(findings, "prefix")
    assert finding.level == "warn"
    assert "2 of 2 pairs" in finding.message
    assert "<think>" in finding.message


@pytest.mark.parametrize(("long", "level"), [(5, "pass"), (6, "warn"), (100, "refuse")])
def test_pairs_longer_than_max_length_are_counted(
    write: Callable[..., Path], tokenizer: Any, long: int, level: str
) -> None:
    rows = [row(i, chosen=answer("word " * 100)) if i < long else row(i) for i in range(100)]
    finding = finding_named(preflight.check_dataset(write(rows), tokenizer, max_length=64), "length")
    assert finding.level == level
    assert f"{long} of 100 pairs ({long}%) are longer than max_length = 64 tokens" in finding.message
    assert "ends are cut off" in finding.message


def test_prompts_that_fill_max_length_are_reported_as_dropped(write: Callable[..., Path], tokenizer: Any) -> None:
    rows = [row(0), row(1, prompt=[{"role": "user", "content": "word " * 100}])]
    finding = finding_named(preflight.check_dataset(write(rows), tokenizer, max_length=64), "length")
    assert finding.level == "warn"
    assert "1 pairs, whose prompt alone fills max_length, are dropped" in finding.message


def test_pairs_that_the_trainer_drops_are_reported(write: Callable[..., Path], tokenizer: Any) -> None:
    """TRL's trainer of reward models drops pairs instead of cutting them."""
    prompt = [{"role": "user", "content": "word " * 100}]
    rows = [row(0), row(1, prompt=prompt), *(row(i, rejected=answer("word " * 100)) for i in range(2, 4))]
    finding = finding_named(
        preflight.check_dataset(write(rows), tokenizer, max_length=64, drops_overlong=True), "length"
    )
    assert "3 of 4 pairs (75%) are longer" in finding.message
    assert finding.message.endswith("; these pairs are dropped")


def test_large_datasets_are_sampled_and_the_message_says_so(
    write: Callable[..., Path], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "MAX_SAMPLED_PAIRS", 10)
    findings = preflight.check_dataset(write([row(i) for i in range(95)]), tokenizer, max_length=256)
    assert "all of 10 sampled pairs" in finding_named(findings, "template").message


def test_the_example_is_the_rendered_template(write: Callable[..., Path], tokenizer: Any) -> None:
    _, frame = preflight.check_rows(write([row(chosen=answer("word " * 1_000))]))
    assert frame is not None
    rendered = chat_template.render_example(frame, tokenizer)
    assert "<|im_start|>user\nQuestion 0?<|im_end|>\n<|im_start|>assistant\nchosen:\nword" in rendered
    assert rendered.endswith("rejected:\nBad answer, number 0.<|im_end|>")
    assert "characters ...]" in rendered
    assert len(rendered) < 3 * chat_template.MAX_SHOWN_CHARS


def test_the_template_receives_tools_and_calls_as_values(write: Callable[..., Path], tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
        "{% for m in messages %}{% if 'tool_calls' in m %}<{{ m.tool_calls[0].function.arguments.city }}>"
        "{% else %}{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    call = [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}]
    prompt = [
        {"role": "user", "content": "Weather?", "tool_calls": None, "tool_call_id": None},
        {"role": "assistant", "content": "", "tool_calls": call, "tool_call_id": None},
        {"role": "tool", "content": "Rain", "tool_calls": None, "tool_call_id": "1"},
    ]
    tools = '[{"type": "function", "function": {"name": "weather", "parameters": {}}}]'
    _, frame = preflight.check_rows(write([row(prompt=prompt, tools=tools)]))
    assert frame is not None
    assert "[weather]user: Weather?\n<Oslo>tool: Rain\nassistant:" in chat_template.render_example(frame, tokenizer)
