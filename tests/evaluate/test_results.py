"""Win rates, length control, refusal rates and KL divergence, against values that can be computed by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rlaif.evaluate import answer_metrics, kl, win_rate
from rlaif.evaluate.answer_metrics import ModelAnswer
from rlaif.evaluate.evaluation_result import read_evaluation
from rlaif.evaluate.win_rate import Comparison


def test_contradicting_orders_and_identical_answers_are_ties() -> None:
    comparisons = [
        Comparison(0.9, 0.6, 10, 10),  # a win in both orders
        Comparison(0.9, 0.2, 10, 10),  # whichever is shown first
        Comparison(0.5, 0.5, 10, 10),  # identical answers
        Comparison(0.1, 0.4, 10, 10),  # a loss in both
    ]
    result = win_rate.win_rate(comparisons)
    assert (result.wins, result.ties, result.losses) == (1, 2, 1)
    assert result.win_rate is not None
    assert (result.win_rate.value, result.win_rate.n) == (0.5, 4)
    assert result.win_rate.low < 0.2
    assert result.length_ratio is not None
    assert result.length_ratio.value == 1.0
    assert win_rate.win_rate([]).win_rate is None


def test_length_control_removes_a_preference_for_length_alone() -> None:
    """The longer answer wins 95 of 100; 80 of 100 times the trained one is. Neither is better at equal length."""
    random = np.random.default_rng(0)
    comparisons = []
    for index in range(1_000):
        longer = 100 if index % 5 else -100
        wins = (longer > 0) != (random.random() < 0.05)
        comparisons.append(Comparison(*((0.9, 0.9) if wins else (0.1, 0.1)), 500 + longer, 500))
    result = win_rate.win_rate(comparisons)
    assert result.win_rate is not None
    assert result.length_controlled is not None
    assert result.win_rate.value > 0.7
    assert result.length_controlled.low < 0.5 < result.length_controlled.high
    assert result.length_controlled.high - result.length_controlled.low < 0.3


def test_length_control_without_a_length_difference_keeps_the_win_rate() -> None:
    result = win_rate.win_rate([Comparison(0.9, 0.9, 10, 10)] * 30 + [Comparison(0.1, 0.1, 10, 10)] * 10)
    assert result.length_controlled is not None
    assert result.length_controlled.value == pytest.approx(0.75, abs=0.001)
    all_won = win_rate.win_rate([Comparison(0.9, 0.9, 10, 12)] * 30).length_controlled
    assert all_won is not None
    assert 0.95 < all_won.value < 1.0
    assert 0.85 < all_won.low < 0.9


def test_refusal_rates_are_per_class_of_prompt() -> None:
    answers = [ModelAnswer("reference", "benign", "comply")] * 9 + [ModelAnswer("reference", "benign", "refuse")]
    answers += [ModelAnswer("trained", "benign", "partial")] * 10 + [ModelAnswer("trained", "harmful", "refuse")] * 4
    answers += [ModelAnswer("trained", "benign", None)]
    benign, harmful = answer_metrics.refusal_rates(answers)
    assert (benign.prompt_class, harmful.prompt_class) == ("benign", "harmful")
    assert benign.reference is not None
    assert benign.trained is not None
    assert harmful.trained is not None
    assert (benign.reference.value, benign.reference.n) == (0.1, 10)
    assert (benign.trained.value, benign.trained.n) == (0.0, 10)
    assert harmful.trained.value == 1.0
    assert harmful.reference is None


def test_check_pass_rates_are_paired_by_prompt() -> None:
    pass_rates = answer_metrics.check_pass_rates([(0.0, 1.0), (0.5, 1.0), (1.0, 1.0), (0.0, 0.0)] * 25)
    assert pass_rates is not None
    assert (pass_rates.reference.value, pass_rates.trained.value, pass_rates.gain.value) == (
        0.375,
        0.75,
        0.375,
    )
    assert pass_rates.gain.low > 0.25
    # Pairing makes the interval of the gain narrower than those of the two shares.
    assert pass_rates.gain.high - pass_rates.gain.low < 0.2
    assert answer_metrics.check_pass_rates([]) is None


def test_equal_check_scores_on_all_prompts_do_not_make_the_rate_certain() -> None:
    few, many = answer_metrics.check_pass_rates([(0.0, 1.0)] * 4), answer_metrics.check_pass_rates([(0.0, 1.0)] * 400)
    assert few is not None
    assert many is not None
    assert (few.gain.value, few.gain.high, many.gain.high) == (1.0, 1.0, 1.0)
    assert few.gain.low < 0.1 < 0.97 < many.gain.low
    # A gain of zero is in the middle of its interval; a share of zero is at its lower bound.
    none = answer_metrics.check_pass_rates([(0.0, 0.0)] * 40)
    assert none is not None
    assert none.reference.low == none.reference.value == 0.0 < none.reference.high
    assert none.gain.low == -none.gain.high < -0.05
    half = answer_metrics.check_pass_rates([(0.5, 0.5)] * 40)
    assert half is not None
    assert 0.0 < half.trained.low < half.trained.value < half.trained.high < 1.0


@pytest.mark.parametrize("text", ["", "[]", '{"trained": "model-1"}', '{"win_rate": 0.5, "refusals": null}'])
def test_an_evaluation_file_of_another_version_is_ignored(text: str, tmp_path: Path) -> None:
    assert read_evaluation(tmp_path / "evaluation.json") is None
    (tmp_path / "evaluation.json").write_text(text)
    assert read_evaluation(tmp_path / "evaluation.json") is None


@pytest.mark.real
def test_kl_of_a_model_from_itself_is_zero_and_changed_weights_increase_it(small: Path, tmp_path: Path) -> None:
    """In float32, because bfloat16 rounding differs between CPUs."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, reference = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32), str(tmp_path / "base")
    base.save_pretrained(reference)
    AutoTokenizer.from_pretrained(small).save_pretrained(reference)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    model.save_pretrained(tmp_path / "same")  # a new adapter changes nothing
    torch.manual_seed(0)
    for name, weights in model.named_parameters():
        if "lora_B" in name:
            weights.data.normal_(std=0.05)
    model.save_pretrained(tmp_path / "moved")
    answered = [
        ({"messages": [{"role": "user", "content": f"Say {word}."}]}, f"{word} {word}")
        for word in ("red", "blue", "green")
    ]
    unchanged = kl.estimate_kl(answered, reference=reference, trained=str(tmp_path / "same"), adapter=True)
    moved = kl.estimate_kl(answered, reference=reference, trained=str(tmp_path / "moved"), adapter=True)
    assert unchanged is not None
    assert moved is not None
    assert unchanged.per_answer.value == pytest.approx(0.0, abs=1e-6)
    assert moved.per_answer.value != pytest.approx(0.0, abs=1e-6)
    assert moved.per_answer.n == 3
    # A merged model has the same divergence as its adapter.
    merged_model = model.merge_and_unload()
    merged_model.save_pretrained(tmp_path / "merged")
    merged = kl.estimate_kl(answered, reference=reference, trained=str(tmp_path / "merged"), adapter=False)
    assert merged is not None
    assert merged.per_token.value == pytest.approx(moved.per_token.value, abs=1e-4)
    assert (
        kl.estimate_kl(
            [({"messages": [{"role": "user", "content": "Say."}]}, "")], reference=reference, trained="x", adapter=True
        )
        is None
    )


TOOL_TEMPLATE = """{% for tool in tools or [] %}tool {{ tool.function.name }};{% endfor %}{% for m in messages %}
{%- for call in m.tool_calls or [] %}{% for name, value in call.function.arguments.items() %}{{ name }}={{ value }};
{%- endfor %}{% endfor %}{{ m.content or '' }};{% endfor %}{% if add_generation_prompt %}says:{% endif %}"""
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
TOOL_MESSAGES = [
    {"role": "user", "content": "Is it cold?"},
    {"role": "assistant", "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}]},
    {"role": "tool", "content": "-5", "tool_call_id": "1"},
]  # fmt: skip


def test_a_prompt_with_tools_is_tokenized_as_the_server_rendered_it() -> None:
    from transformers import AutoTokenizer

    from rlaif.serving.demo_model import demo_checkpoint

    tokenizer = AutoTokenizer.from_pretrained(demo_checkpoint())
    tokenizer.chat_template = TOOL_TEMPLATE
    encoded = kl._tokens(tokenizer, {"messages": TOOL_MESSAGES, "tools": TOOLS}, "Yes.")
    assert encoded is not None
    ids, start = encoded
    assert tokenizer.decode(ids[:start]) == "tool weather;Is it cold?;city=Oslo;;-5;says:"
    assert tokenizer.decode(ids[start:]) == "Yes."


def test_kl_of_answers_sampled_with_other_settings_is_reported_as_biased() -> None:
    assert kl.kl_caveat(1.0, 1.0) is None
    assert "temperature 0.7 and top_p 1," in str(kl.kl_caveat(0.7, 1.0))
    assert "temperature 1 and top_p 0.9," in str(kl.kl_caveat(1.0, 0.9))
