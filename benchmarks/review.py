"""Latency of the review page: time from a key press to the next pair painted, with many pairs queued.

    python -m benchmarks.review [--pairs 10000] [--labels 1000]

Runs the real command and a real Chromium. The browser's own clock measures from the key event's time stamp until the
frame with the next pair is painted. In between, the label is journaled and written to disk. Answers are 400 to 2,400
characters of Markdown with a list and a code block. Prints JSON: n, median, p95, p99 and maximum in milliseconds, p95
with a bootstrap interval.
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

# Measures the unmodified page from outside. A frame is painted when a message posted in its requestAnimationFrame
# callback arrives.
CLOCK_SCRIPT = """() => {
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


def make_answer(rng: random.Random, vocabulary: list[str]) -> str:
    """Return random Markdown that ends in "good" or "poor", by which the scripted judge decides."""

    def words(n: int) -> str:
        return " ".join(rng.choices(vocabulary, k=n))

    paragraphs = [words(rng.randint(20, 120)) for _ in range(rng.randint(2, 4))]
    points = "\n".join(f"- **{words(1)}** {words(8)}" for _ in range(3))
    code = f"```python\ndef {words(1)}(x):\n    return x + {rng.randint(1, 99)}  # {words(4)}\n```"
    return "\n\n".join([*paragraphs, points, code, rng.choice(["good", "poor"])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10_000, help="pairs in the review queue [default: 10000]")
    parser.add_argument("--labels", type=int, default=1_000, help="labels to give [default: 1000]")
    options = parser.parse_args()
    rng = random.Random(0)
    vocabulary = ["salt", "river", "bread", "the", "of", "and", "bridge", "under", "glass", "slowly", "paper", "train"]
    prompts = [
        {
            "prompt": f"Question {number}: {' '.join(rng.choices(vocabulary, k=12))}?",
            "responses": [make_answer(rng, vocabulary), make_answer(rng, vocabulary)],
        }
        for number in range(options.pairs)
    ]
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
    """Label ``count`` pairs by keyboard and return the latencies in milliseconds."""
    from playwright.sync_api import sync_playwright

    with PageServer(run, "--annotator", "ada") as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.goto(server.links["ada"])
        page.wait_for_selector("#pair:not([hidden])")
        page.evaluate(CLOCK_SCRIPT)
        for number in range(count):
            page.keyboard.press(["ArrowLeft", "ArrowRight", "t"][number % 3])
            page.wait_for_function("n => window.times.length > n", arg=number)
        times: list[float] = page.evaluate("window.times")
        browser.close()
    return times


def p95_interval(times: list[float]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the 95th percentile."""
    rng: Any = np.random.default_rng(0)
    quantiles = [np.quantile(rng.choice(times, len(times)), 0.95) for _ in range(1000)]
    return float(np.quantile(quantiles, 0.025)), float(np.quantile(quantiles, 0.975))


if __name__ == "__main__":
    main()
