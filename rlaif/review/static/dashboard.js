// The lead's dashboard, refreshed every ten seconds while it is visible.

import { get } from "./server.js";
import { element } from "./text.js";

const REFRESH_MS = 10_000;
const $ = (id) => document.getElementById(id);
const integer = (value) => Math.round(value).toLocaleString();
const percent = (value) => (value == null ? "–" : `${Math.round(value * 100)} %`);
const LABEL = { a: "first answer", b: "second answer", tie: "tie", both_bad: "both bad" };

// A value with its 95 % interval and n.
const estimate = (result, asPercent) => {
  if (!result) return "–";
  const format = (value) => (asPercent ? integer(value * 100) : (Math.round(value * 100) / 100 || 0).toFixed(2)); // || 0: no "-0.00"
  return `${format(result.value)}${asPercent ? " %" : ""} [${format(result.low)}, ${format(result.high)}] (n = ${result.n})`;
};

const duration = (hours) => {
  if (hours == null) return "–";
  if (hours === 0) return "0 min";
  if (hours < 1) return `${Math.max(1, Math.round(hours * 60))} min`;
  return hours < 48 ? `${hours.toFixed(1)} h` : `${Math.round(hours / 24)} days`;
};

const ago = (seconds) => (seconds ? `${duration((Date.now() / 1000 - seconds) / 3600)} ago` : "–");

function table(id, heads, rows) {
  const head = element("tr", {}, ...heads.map((text) => element("th", { scope: "col", textContent: text })));
  const lines = rows.map(([first, ...rest]) =>
    element("tr", {}, element("th", { scope: "row", textContent: first }), ...rest.map((text) => element("td", { textContent: text }))));
  $(id).replaceChildren(element("thead", {}, head), element("tbody", {}, ...lines));
  $(id).parentElement.hidden = !rows.length;
}

function show(data) {
  const { pairs, agreement } = data;
  $("bar").value = pairs.queued ? pairs.labeled / pairs.queued : 1;
  $("count").textContent = `${integer(pairs.labeled)} of ${integer(pairs.queued)} pairs labeled`;
  const open = data.disagreements - data.adjudicated;
  $("adjudicate").textContent = open ? `Adjudicate ${integer(open)}` : "Adjudicate";
  const figures = [
    ["Labels pending", integer(pairs.labels_due)],
    ["Labels per hour", integer(data.labels_per_hour)],
    ["Time left", duration(data.eta_hours)],
    ["Disagreements", integer(data.disagreements), `(${integer(data.adjudicated)} adjudicated)`],
    ["Agreement with the judges", ...estimate(data.judge_agreement, true).split(/ (?=\[)/)],
    ["Neither is better", ...estimate(data.tie_rate, true).split(/ (?=\[)/)],
    ["Skipped", ...estimate(data.skip_rate, true).split(/ (?=\[)/)],
  ];
  $("figures").replaceChildren(...figures.map(([name, value, more = ""]) =>
    element("div", {}, element("dt", { textContent: name }), element("dd", {}, `${value} `, element("small", { textContent: more })))));
  table("annotators", ["Name", "Labels", "Skips", "Better answers", "Labels per hour", "Seconds per pair", "Chose left", "Gold accuracy", "Last label"],
    data.annotators.map((row) => [row.name, integer(row.labels), integer(row.skips), integer(row.edits), integer(row.labels_per_hour),
      row.median_seconds == null ? "–" : row.median_seconds.toFixed(1), percent(row.left_fraction), estimate(row.gold_accuracy, true), ago(row.last_label_at)]));
  $("alpha").textContent = agreement.pairs
    ? `Krippendorff's alpha ${estimate(agreement.alpha)}: 1 is perfect agreement, 0 is chance. Pairs with several labels: ${integer(agreement.pairs)}.`
    : "No pair has labels from two annotators yet.";
  table("kappas", ["Annotators", "Cohen's kappa", "Same label"],
    agreement.kappas.map((row) => [row.annotators.join(" and "), estimate(row.kappa), estimate(row.same_label, true)]));
  table("gold", ["Prompt", "Annotator", "Label", "Correct label", "Reason"],
    data.gold_missed.map((row) => [row.prompt, row.annotator, LABEL[row.label], LABEL[row.gold_label], row.reason]));
  $("gold-none").textContent = data.gold_missed.length ? "" : "None.";
}

async function refresh() {
  if (!document.hidden) {
    try {
      show(await get("dashboard"));
      $("error").hidden = true;
    } catch (error) {
      $("error-text").textContent = error instanceof TypeError ? "The server is not responding." : error.message;
      $("error").hidden = false;
    }
  }
  setTimeout(refresh, REFRESH_MS);
}

refresh();
