#!/bin/sh
# The whole night in small. Every step can be stopped and given again: it goes on from where it was.
set -eu
BIN=${BIN:-.venv/bin} RUN=${RUN:-demo}
began=$(date +%s)
step() { printf '\n== %s\n' "$*"; }

step "1/4 A run in $RUN/, with the demo's settings"
mkdir -p "$RUN"
[ -f "$RUN/rlaif.toml" ] || cp examples/demo/rlaif.toml "$RUN/rlaif.toml"
echo "settings: $RUN/rlaif.toml"

step "2/4 Four answers to each prompt, sampled from SmolLM2-135M-Instruct in a real vLLM"
echo "usually 1 to 2 minutes, most of it vLLM's start; its log: $RUN/log/vllm-demo.log"
"$BIN/rlaif" generate "$RUN"

step "3/4 Judged in both orders by an LLM, pairs built, about 10 % queued for people"
echo "usually 1 to 3 minutes; the same log"
"$BIN/rlaif" judge "$RUN"

step "4/4 A LoRA adapter trained on the pairs by TRL's DPOTrainer"
echo "usually half a minute to 2 minutes; progress below"
"$BIN/rlaif" train "$RUN" --restart

step "Done in $(($(date +%s) - began)) s. What there is now:"
"$BIN/rlaif" status "$RUN"
cat <<TEXT

Next, yourself:
  $BIN/rlaif review $RUN                     the queue as a page: label blind, by keyboard
  $BIN/rlaif report $RUN                     the morning page: can the labels be trusted?
  $BIN/rlaif export $RUN --format trl -o dataset   the dataset for another trainer
  $BIN/rlaif init my-run                     a run of your own: edit my-run/rlaif.toml
TEXT
