// The lead's numbers, read anew every few seconds while somebody looks.

import { get } from "./server.js";
import { element } from "./text.js";

const EVERY = 10_000;
const $ = (id) => document.getElementById(id);
const whole = (value) => Math.round(value).toLocaleString();
const share = (value) => (value == null ? "–" : `${Math.round(value * 100)} %`);
const LABEL = { a: "first", b: "second", tie: "a tie", both_bad: "both bad" };

const estimate = (found, percent) => {
  if (!found) return "–";
  const shown = (value) => (percent ? whole(value * 100) : value.toFixed(2));
  return `${shown(found.value)}${percent ? " %" : ""} [${shown(found.low)}, ${shown(found.high)}] (n = ${found.n})`;
};

const duration = (hours) => {
  if (hours == null) return "–";
  if (hours < 1) return `${Math.max(1, Math.round(hours * 60))} min`;
  return hours < 48 ? `${hours.toFixed(1)} h` : `${Math.round(hours / 24)} days`;
};

const ago = (at) => (at ? `${duration((Date.now() / 1000 - at) / 3600)} ago` : "–");

function table(id, heads, rows) {
  const head = element("tr", {}, ...heads.map((text) => element("th", { scope: "col", textContent: text })));
  const lines = rows.map(([first, ...rest]) =>
    element("tr", {}, element("th", { scope: "row", textContent: first }), ...rest.map((text) => element("td", { textContent: text }))));
  $(id).replaceChildren(element("thead", {}, head), element("tbody", {}, ...lines));
  $(id).parentElement.hidden = !rows.length;
}

function show(facts) {
  const { pairs, agreement } = facts;
  $("bar").value = pairs.queued ? pairs.labelled / pairs.queued : 1;
  $("count").textContent = `${whole(pairs.labelled)} of ${whole(pairs.queued)} pairs labelled`;
  const open = facts.disagreements - facts.adjudicated;
  $("adjudicate").textContent = open ? `Adjudicate ${whole(open)}` : "Adjudicate";
  const figures = [
    ["Labels still due", whole(pairs.labels_due)],
    ["Labels an hour", whole(facts.per_hour)],
    ["Time left", duration(facts.eta_hours)],
    ["People disagree on", whole(facts.disagreements), `(${whole(facts.adjudicated)} adjudicated)`],
    ["People agree with judges", ...estimate(facts.with_judges, true).split(/ (?=\[)/)],
  ];
  $("figures").replaceChildren(...figures.map(([name, value, more = ""]) =>
    element("div", {}, element("dt", { textContent: name }), element("dd", {}, `${value} `, element("small", { textContent: more })))));
  table("people", ["Name", "Labels", "Skips", "Edits", "An hour", "Seconds a pair", "Chose left", "Gold right", "Last label"],
    facts.people.map((row) => [row.name, whole(row.labels), whole(row.skips), whole(row.edits), whole(row.per_hour),
      row.seconds == null ? "–" : row.seconds.toFixed(1), share(row.left_share), estimate(row.gold, true), ago(row.last_at)]));
  $("alpha").textContent = agreement.pairs
    ? `Krippendorff's alpha ${estimate(agreement.alpha)}: 1 is perfect, 0 what chance would give. ${whole(agreement.pairs)} pairs were labelled by several people.`
    : "No pair was labelled by two people yet.";
  table("kappas", ["People", "Cohen's kappa", "Same label"],
    agreement.kappas.map((row) => [row.people.join(" and "), estimate(row.kappa), estimate(row.same, true)]));
  table("gold", ["Prompt", "Who", "Said", "Known to be better", "Why"],
    facts.gold_missed.map((row) => [row.prompt, row.annotator, LABEL[row.said], LABEL[row.known], row.why]));
  $("gold-none").textContent = facts.gold_missed.length ? "" : "None.";
}

async function refresh() {
  if (!document.hidden) {
    try {
      show(await get("facts"));
      $("trouble").hidden = true;
    } catch (error) {
      $("trouble-text").textContent = error instanceof TypeError ? "The server does not answer." : error.message;
      $("trouble").hidden = false;
    }
  }
  setTimeout(refresh, EVERY);
}

refresh();
