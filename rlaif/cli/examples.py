"""At least two examples per command: shown at the end of its help and in docs/reference/commands.md."""

from __future__ import annotations

EXAMPLES: dict[str, list[str]] = {
    "init": ["rlaif init my-run", "rlaif init next --from my-run --prompts fresh.jsonl"],
    "plan": [
        "rlaif plan --prompts 100k -n 4 --gpus 8 --usd-per-gpu-hour 2.50",
        "rlaif plan --prompts 1M --from my-run",
    ],
    "run": ["rlaif run my-run --until 07:00 --train", "rlaif run my-run --for 8h --budget-usd 20 --dry-run"],
    "generate": [
        "rlaif generate my-run --prompts prompts.jsonl -n 4 --model Qwen/Qwen3-8B",
        "rlaif generate my-run --import answers.jsonl",
    ],
    "judge": [
        "rlaif judge my-run --judge helpful --judge quality --model Qwen/Qwen3-32B",
        "rlaif judge my-run --judge helpful@gpt-4.1-mini --base-url https://api.openai.com/v1 --batch",
    ],
    "review": [
        "rlaif review my-run",
        "rlaif review my-run --annotators ada,bob --host 0.0.0.0",
        "rlaif review my-run --export queue.csv",
        "rlaif review my-run --import queue.csv --annotator ada",
    ],
    "train": ["rlaif train my-run --dry-run", "rlaif train my-run --method kto --full --launcher accelerate"],
    "evaluate": [
        "rlaif evaluate my-run --judge helpful --model another-family/model",
        "rlaif evaluate my-run --prompts fresh.jsonl --dry-run",
    ],
    "report": ["rlaif report my-run", "rlaif report my-run --json"],
    "export": [
        "rlaif export my-run --format llama-factory --output exported",
        "rlaif export my-run --to hf:me/preferences",
    ],
    "status": ["rlaif status", "rlaif status my-run --json"],
    "serve": ["rlaif serve my-run", "rlaif serve --model Qwen/Qwen3-8B --replicas 2 --detach"],
    "docs": ["rlaif docs", "rlaif docs --json"],
    "doctor": ["rlaif doctor", "rlaif doctor my-run"],
    "judges list": ["rlaif judges list", "rlaif judges list --json"],
    "judges show": ["rlaif judges show helpful", "rlaif judges show quality"],
    "judges new": ["rlaif judges new concise", "rlaif judges new concise --kind rate"],
    "judges check": ["rlaif judges check helpful", "rlaif judges check concise --lock"],
    "judges exam": [
        "rlaif judges exam helpful --model Qwen/Qwen3-32B",
        "rlaif judges exam concise --gold gold.jsonl --model gpt-4.1-mini --base-url https://api.openai.com/v1",
    ],
    "prompts list": ["rlaif prompts list", "rlaif prompts list --json"],
    "prompts show": ["rlaif prompts show everyday", "rlaif prompts show refusals > prompts.jsonl"],
    "prompts new": ["rlaif prompts new mine", "rlaif prompts new math"],
    "prompts check": ["rlaif prompts check prompts.jsonl", "rlaif prompts check everyday prompts.jsonl --json"],
    "config schema": ["rlaif config schema", "rlaif config schema > rlaif.schema.json"],
}


def epilog(command: str) -> str:
    """Return the examples of ``command`` for the end of its help. The line with ``\\b`` keeps their line breaks."""
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in EXAMPLES[command])])
