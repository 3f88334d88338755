"""Win rates, length control, refusals and drift, against values that can be worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rlaif.evaluate import answers, drift, winrate
from rlaif.evaluate.answers import Answered
from rlaif.evaluate.winrate import Compared


def test_contradicting_orders_and_equal_answers_are_ties() -> None:
    compared = [
        Compared(0.9, 0.6, 10, 10),  # a win in both orders
        Compared(0.9, 0.2, 10, 10),  # whichever stands first
        Compared(0.5, 0.5, 10, 10),  # the same answer
        Compared(0.1, 0.4, 10, 10),  # a loss in both
    ]
    found = winrate.win_rate(compared)
    assert (found.wins, found.ties, found.losses) == (1, 2, 1)
    assert found.win_rate is not None
    assert (found.win_rate.value, found.win_rate.n) == (0.5, 4)
    assert found.win_rate.low < 0.2
    assert found.length_ratio is not None
    assert found.length_ratio.value == 1.0
    assert winrate.win_rate([]).win_rate is None


def test_a_preference_for_length_alone_is_taken_out() -> None:
    """The longer answer wins 95 of 100, and in 80 of 100 it is the trained model's: of one length, no better."""
    random = np.random.default_rng(0)
    compared = []
    for place in range(1_000):
        longer = 100 if place % 5 else -100
        wins = (longer > 0) != (random.random() < 0.05)
        compared.append(Compared(*((0.9, 0.9) if wins else (0.1, 0.1)), 500 + longer, 500))
    found = winrate.win_rate(compared)
    assert found.win_rate is not None
    assert found.length_controlled is not None
    assert found.win_rate.value > 0.7
    assert found.length_controlled.low < 0.5 < found.length_controlled.high
    assert found.length_controlled.high - found.length_controlled.low < 0.3


def test_length_control_without_a_difference_changes_nothing() -> None:
    found = winrate.win_rate([Compared(0.9, 0.9, 10, 10)] * 30 + [Compared(0.1, 0.1, 10, 10)] * 10)
    assert found.length_controlled is not None
    assert found.length_controlled.value == pytest.approx(0.75, abs=0.001)
    all_won = winrate.win_rate([Compared(0.9, 0.9, 10, 12)] * 30).length_controlled
    assert all_won is not None
    assert 0.95 < all_won.value < 1.0
    assert 0.85 < all_won.low < 0.9


def test_refusals_by_kind_of_prompt() -> None:
    given = [Answered("old", "benign", "comply")] * 9 + [Answered("old", "benign", "refuse")]
    given += [Answered("new", "benign", "partial")] * 10 + [Answered("new", "harmful", "refuse")] * 4
    given += [Answered("new", "benign", None)]
    benign, harmful = answers.refusals(given)
    assert (benign["prompts"], harmful["prompts"]) == ("benign", "harmful")
    assert (benign["old"].value, benign["old"].n) == (0.1, 10)
    assert (benign["new"].value, benign["new"].n) == (0.0, 10)
    assert harmful["new"].value == 1.0
    assert harmful["old"] is None


def test_checks_are_paired_by_prompt() -> None:
    found = answers.checks([(0.0, 1.0), (0.5, 1.0), (1.0, 1.0), (0.0, 0.0)] * 25)
    assert found is not None
    assert (found["reference"].value, found["trained"].value, found["gain"].value) == (0.375, 0.75, 0.375)
    assert found["gain"].low > 0.25
    # Paired, the gain is known better than the two shares by themselves.
    assert found["gain"].high - found["gain"].low < 0.2
    assert answers.checks([]) is None


def test_checks_that_all_prompts_meet_alike_are_no_certainty() -> None:
    few, many = answers.checks([(0.0, 1.0)] * 4), answers.checks([(0.0, 1.0)] * 400)
    assert few is not None
    assert many is not None
    assert (few["gain"].value, few["gain"].high, many["gain"].high) == (1.0, 1.0, 1.0)
    assert few["gain"].low < 0.1 < 0.97 < many["gain"].low
    # A gain of nothing is in the middle of its bounds, a share of nothing at one.
    none = answers.checks([(0.0, 0.0)] * 40)
    assert none is not None
    assert none["reference"].low == none["reference"].value == 0.0 < none["reference"].high
    assert none["gain"].low == -none["gain"].high < -0.05
    half = answers.checks([(0.5, 0.5)] * 40)
    assert half is not None
    assert 0.0 < half["trained"].low < half["trained"].value < half["trained"].high < 1.0


@pytest.mark.real
def test_drift_is_zero_from_itself_and_grows_with_the_weights(small: Path, tmp_path: Path) -> None:
    """In float32: what bfloat16 rounds differs between CPUs."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, reference = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32), str(tmp_path / "base")
    base.save_pretrained(reference)
    AutoTokenizer.from_pretrained(small).save_pretrained(reference)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    model.save_pretrained(tmp_path / "same")  # an adapter begins as nothing
    torch.manual_seed(0)
    for name, weights in model.named_parameters():
        if "lora_B" in name:
            weights.data.normal_(std=0.05)
    model.save_pretrained(tmp_path / "moved")
    said = [
        ({"messages": [{"role": "user", "content": f"Say {word}."}]}, f"{word} {word}")
        for word in ("red", "blue", "green")
    ]
    nothing = drift.kl(said, reference=reference, trained=str(tmp_path / "same"), adapter=True)
    moved = drift.kl(said, reference=reference, trained=str(tmp_path / "moved"), adapter=True)
    assert nothing is not None
    assert moved is not None
    assert nothing["answer"].value == pytest.approx(0.0, abs=1e-6)
    assert moved["answer"].value != pytest.approx(0.0, abs=1e-6)
    assert moved["answer"].n == 3
    # By hand: log p of an answer's tokens under one model less the other's.
    whole = model.merge_and_unload()
    whole.save_pretrained(tmp_path / "whole")
    merged = drift.kl(said, reference=reference, trained=str(tmp_path / "whole"), adapter=False)
    assert merged is not None
    assert merged["token"].value == pytest.approx(moved["token"].value, abs=1e-4)
    assert (
        drift.kl(
            [({"messages": [{"role": "user", "content": "Say."}]}, "")], reference=reference, trained="x", adapter=True
        )
        is None
    )


CALLING = """{% for tool in tools or [] %}tool {{ tool.function.name }};{% endfor %}{% for m in messages %}
{%- for call in m.tool_calls or [] %}{% for name, value in call.function.arguments.items() %}{{ name }}={{ value }};
{%- endfor %}{% endfor %}{{ m.content or '' }};{% endfor %}{% if add_generation_prompt %}says:{% endif %}"""
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
CALLED = [
    {"role": "user", "content": "Is it cold?"},
    {"role": "assistant", "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}]},
    {"role": "tool", "content": "-5", "tool_call_id": "1"},
]  # fmt: skip


def test_a_prompt_with_tools_is_read_as_its_server_showed_it() -> None:
    from transformers import AutoTokenizer

    from rlaif.llm.demo import demo_checkpoint

    tokenizer = AutoTokenizer.from_pretrained(demo_checkpoint())
    tokenizer.chat_template = CALLING
    found = drift._tokens(tokenizer, {"messages": CALLED, "tools": TOOLS}, "Yes.")
    assert found is not None
    ids, start = found
    assert tokenizer.decode(ids[:start]) == "tool weather;Is it cold?;city=Oslo;;-5;says:"
    assert tokenizer.decode(ids[start:]) == "Yes."


def test_the_kl_of_answers_sampled_otherwise_is_told_as_biased() -> None:
    assert drift.doubt(1.0, 1.0) is None
    assert "temperature 0.7 and top_p 1," in str(drift.doubt(0.7, 1.0))
    assert "temperature 1 and top_p 0.9," in str(drift.doubt(1.0, 0.9))
