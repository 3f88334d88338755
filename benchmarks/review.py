"""How long from a key press to the next pair painted, with many pairs queued: real Chromium, the real command.

    python -m benchmarks.review [--pairs 10000] [--labels 1000]

Time is the browser's own: from the key event's time stamp until the frame with the next pair has been painted. In
between the label was journaled and brought to the disk. Answers are 400 to 2,400 characters of Markdown with a list
and a code block. Prints JSON: n, median, p95 and p99 in milliseconds, p95 with a bootstrap interval.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from tests.review_client import CHROMIUM, FLAGS, PageServer, judged_run

# The page as it is; the clock is set from outside. A frame is painted when a message posted in its
# requestAnimationFrame comes in.
CLOCK = """() => {
  window.times = [];
  let pressed = 0;
  document.addEventListener("keydown", (event) => (pressed = event.timeStamp), true);
  new MutationObserver(() => {
    if (!pressed) return;
    const started = pressed;
    pressed = 0;
    requestAnimationFrame(() => {
      const channel = new MessageChannel();
      channel.port1.onmessage = () => window.times.push(performance.now() - started);
      channel.port2.postMessage(null);
    });
  }).observe(document.getElementById("prompt"), { childList: true });
}"""


def answer(rng: random.Random, words: list[str]) -> str:
    def some(n: int) -> str:
        return " ".join(rng.choices(words, k=n))

    paragraphs = [some(rng.randint(20, 120)) for _ in range(rng.randint(2, 4))]
    points = "\n".join(f"- **{some(1)}** {some(8)}" for _ in range(3))
    code = f"```python\ndef {some(1)}(x):\n    return x + {rng.randint(1, 99)}  # {some(4)}\n```"
    return "\n\n".join([*paragraphs, points, code, rng.choice(["good", "poor"])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=10_000)
    parser.add_argument("--labels", type=int, default=1_000)
    options = parser.parse_args()
    rng = random.Random(0)
    words = ["salt", "river", "bread", "the", "of", "and", "bridge", "under", "glass", "slowly", "paper", "train"]
    prompts = [{"prompt": f"Question {number}: {' '.join(rng.choices(words, k=12))}?",
                "responses": [answer(rng, words), answer(rng, words)]} for number in range(options.pairs)]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        run = judged_run(Path(folder) / "run", prompts, **{"pairs.min_confidence": 0.5})
        sys.stderr.write(f"{options.pairs:,} pairs judged in {time.monotonic() - started:.0f} s\n")
        times = time_labels(run.path, options.labels)
        journaled = run.reviews().height
    low, high = p95_interval(times)
    print(json.dumps({
        "pairs": options.pairs, "n": len(times), "labels_journaled": journaled,
        "median_ms": round(float(np.median(times)), 1), "p95_ms": round(float(np.quantile(times, 0.95)), 1),
        "p95_interval_ms": [round(low, 1), round(high, 1)], "p99_ms": round(float(np.quantile(times, 0.99)), 1),
        "max_ms": round(float(max(times)), 1),
    }))  # fmt: skip


def time_labels(run: Path, count: int) -> list[float]:
    from playwright.sync_api import sync_playwright

    with PageServer(run, "--annotator", "ada") as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.goto(server.links["ada"])
        page.wait_for_selector("#pair:not([hidden])")
        page.evaluate(CLOCK)
        for number in range(count):
            page.keyboard.press(["ArrowLeft", "ArrowRight", "t"][number % 3])
            page.wait_for_function("n => window.times.length > n", arg=number)
        times: list[float] = page.evaluate("window.times")
        browser.close()
    return times


def p95_interval(times: list[float]) -> tuple[float, float]:
    rng: Any = np.random.default_rng(0)
    quantiles = [np.quantile(rng.choice(times, len(times)), 0.95) for _ in range(1000)]
    return float(np.quantile(quantiles, 0.025)), float(np.quantile(quantiles, 0.975))


if __name__ == "__main__":
    main()
