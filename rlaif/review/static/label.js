// Labelling. A choice is kept in the browser, sent, and only when the server has it on its disk does the page move on;
// the next pairs are here by then. When the server does not answer, nothing moves and the choice is sent again.

import * as differences from "./differences.js";
import * as kept from "./kept.js";
import { get, post, Refusal } from "./server.js";
import { body, element, prompt } from "./text.js";

const AHEAD = 4;
const LOOK_AGAIN = 5000;
const $ = (id) => document.getElementById(id);
const SAID = { left: "left is better", right: "right is better", tie: "a tie", both_bad: "both bad", skip: "skipped" };

const state = {
  tab: "",
  pair: null, // what is shown
  ahead: [], // what comes next
  behind: document.body.dataset.history.split(",").filter(Boolean),
  busy: false,
  ended: false,
  raw: false,
  differ: false,
  seen: 0, // milliseconds that the pair has been looked at, and since when
  since: 0,
  judge: null,
};

// Showing

function show(pair) {
  state.pair = pair;
  state.seen = 0;
  state.since = document.hidden ? 0 : performance.now();
  $("empty").hidden = true;
  $("pair").hidden = $("desk").hidden = false;
  paint();
  const draft = { ...(pair.mine ?? {}), ...kept.draft(pair.id) };
  $("comment").value = draft.comment ?? "";
  $("edited").value = draft.edited ?? "";
  sure(draft.sure ?? null);
  open("commenting", Boolean(draft.comment));
  open("editing", Boolean(draft.edited));
  for (const button of document.querySelectorAll(".choice")) {
    button.setAttribute("aria-pressed", String(button.dataset.choice === pair.mine?.choice));
  }
  $("onward").hidden = !pair.mine;
  scrollTo(0, 0);
}

function paint() {
  const { pair, raw } = state;
  differences.supported && differences.hide();
  $("prompt").replaceChildren(prompt(pair.turns, raw));
  for (const side of ["left", "right"]) $(side).querySelector(".text").replaceChildren(body(pair[side], raw));
  votes(pair.votes);
  if (state.differ) differences.show($("left").querySelector(".text"), $("right").querySelector(".text"));
}

function votes(list) {
  $("votes").hidden = !list;
  if (!list) return;
  const lines = list.map((vote) => {
    const sureness = ["", ", a guess", ", fairly sure", ", certain"][vote.sure ?? 0];
    const line = element("li", {}, element("b", { textContent: vote.annotator }), ` ${SAID[vote.choice]}${sureness}`);
    if (vote.comment) line.append(element("q", { textContent: vote.comment }));
    if (vote.edited) line.append(element("details", {}, element("summary", { textContent: "wrote an answer" }), body({ text: vote.edited, html: null }, true)));
    return line;
  });
  $("votes").replaceChildren(element("h2", { textContent: "What people said" }), element("ul", {}, ...lines));
}

function end() {
  state.pair = null;
  $("pair").hidden = $("desk").hidden = true;
  $("empty-title").textContent = document.body.dataset.lead ? "No disagreement is open." : "Nothing waits for you.";
  $("empty-text").textContent = state.behind.length
    ? `You have labelled ${state.behind.length.toLocaleString()} pairs, and every one is saved. U goes back to the last.`
    : "The queue is empty, or others have labelled what there is.";
  $("empty").hidden = false;
  $("empty").focus();
  setTimeout(again, LOOK_AGAIN);
}

// Pairs come back that others skipped or left, and new ones from a night's judging.
async function again() {
  if (state.pair || state.busy) return;
  await refill().catch(() => {});
  if (state.pair || state.busy) return;
  if (state.ahead.length) await move();
  else setTimeout(again, LOOK_AGAIN);
}

function progress({ done, left }) {
  $("bar").value = done + left ? done / (done + left) : 1;
  $("count").textContent = `${done.toLocaleString()} done, ${left.toLocaleString()} to go`;
}

function trouble(text) {
  $("trouble").hidden = !text;
  $("trouble-text").textContent = text ?? "";
}

// Getting pairs

let asking = null;

function refill() {
  asking ??= (async () => {
    try {
      const have = [state.pair, ...state.ahead].filter(Boolean).map((pair) => pair.id);
      const found = await get("next", { tab: state.tab, have: have.join(","), count: AHEAD });
      const known = new Set(have);
      state.ahead.push(...found.items.filter((pair) => !known.has(pair.id)));
      state.ended = found.items.length === 0;
      progress(found.progress);
    } finally {
      asking = null;
    }
  })();
  return asking;
}

async function move() {
  if (!state.ahead.length) await insist(refill);
  const next = state.ahead.shift();
  if (next) show(next);
  else end();
  if (state.ahead.length <= AHEAD / 2) refill().catch(() => {}); // asked again when it is needed
}

// Until the server answers: say so, and try again, at once when the network or the person says so.
async function insist(act) {
  for (let wait = 400; ; wait = Math.min(wait * 1.6, 5000)) {
    try {
      const found = await act();
      trouble(null);
      return found;
    } catch (error) {
      if (error instanceof Refusal) throw error;
      const why = error.message && !(error instanceof TypeError) ? error.message : "The server does not answer";
      trouble(`${why}. What you chose and wrote is kept here and sent again by itself.`);
      await new Promise((done) => {
        const again = () => (clearTimeout(timer), removeEventListener("online", again), $("retry").removeEventListener("click", again), done());
        const timer = setTimeout(again, wait);
        addEventListener("online", again);
        $("retry").addEventListener("click", again);
      });
    }
  }
}

// Choosing

async function choose(choice) {
  if (state.busy || !state.pair) return;
  const pair = state.pair;
  const label = {
    id: pair.id,
    choice,
    comment: $("comment").value,
    edited: $("edited").value.trim() ? $("edited").value : null,
    sure: pressed(),
    seconds: Math.round(looked() / 100) / 10,
  };
  state.busy = true;
  document.body.classList.add("busy");
  kept.keepPending(state.tab, label);
  document.querySelector(`.choice[data-choice=${choice}]`).setAttribute("aria-pressed", "true");
  try {
    await send(label, state.tab);
    state.behind = [...state.behind.filter((id) => id !== pair.id), pair.id];
    await move();
    $("said").textContent = `Saved: ${SAID[choice]}. ${state.pair ? "Next pair." : ""}`;
  } catch (error) {
    trouble(`Not saved: ${error.message} Your text is still here.`);
  } finally {
    state.busy = false;
    document.body.classList.remove("busy");
  }
}

async function send(label, tab) {
  let saved;
  try {
    saved = await insist(() => post("label", label));
  } catch (error) {
    kept.dropPending(tab); // refused for good: the draft stays, so that nothing written is lost
    kept.keepDraft(label.id, { comment: label.comment, edited: label.edited, sure: label.sure });
    throw error;
  }
  kept.dropPending(tab);
  kept.dropDraft(label.id);
  progress(saved.progress);
  state.judge = saved.judge;
  $("after").hidden = false;
  $("saved").textContent = `Saved: ${SAID[label.choice]}.`;
  verdict(false);
}

async function back() {
  if (state.busy || !state.behind.length) return;
  state.busy = true;
  try {
    const id = state.behind.at(-1);
    const pair = await insist(() => get("item", { id }));
    state.behind.pop();
    if (state.pair) state.ahead.unshift(state.pair);
    show(pair);
    $("said").textContent = `Back. You said: ${SAID[pair.mine?.choice] ?? "nothing"}.`;
  } catch (error) {
    trouble(error.message);
  } finally {
    state.busy = false;
  }
}

async function onward() {
  if (state.busy || !state.pair?.mine) return;
  state.behind.push(state.pair.id);
  await move();
}

function looked() {
  return state.seen + (state.since ? performance.now() - state.since : 0);
}

function verdict(shown) {
  const { p_left: p, reason } = state.judge ?? {};
  const sides = p == null ? "The judges gave no verdict on it." : p === 0.5 ? "The judges saw no difference."
    : `The judges preferred the ${p > 0.5 ? "left" : "right"} one, p = ${Math.max(p, 1 - p).toFixed(2)}.`;
  $("verdict").textContent = `The pair before: ${sides}${reason ? ` Sent to people as ${reason}.` : ""}`;
  $("verdict").hidden = !shown;
  $("judge").setAttribute("aria-expanded", String(shown));
}

// Writing

function open(part, shown) {
  $(part).hidden = !shown;
  $("writing").hidden = $("editing").hidden && $("commenting").hidden;
  $(part === "editing" ? "write" : "say").setAttribute("aria-expanded", String(shown));
}

function keep() {
  if (!state.pair) return;
  kept.keepDraft(state.pair.id, { comment: $("comment").value, edited: $("edited").value, sure: pressed() });
}

function leave() {
  if (!$("edited").value.trim()) open("editing", false);
  if (!$("comment").value.trim()) open("commenting", false);
  document.activeElement?.blur();
}

function startFrom(side) {
  const text = state.pair[side].text;
  const field = $("edited");
  if (field.value.trim() && field.value !== text && !confirm("Replace what you have written?")) return;
  field.value = text;
  keep();
  field.focus();
  field.setSelectionRange(0, 0);
}

const pressed = () => {
  const button = document.querySelector("[data-sure][aria-pressed=true]");
  return button ? Number(button.dataset.sure) : null;
};

function sure(value) {
  for (const button of document.querySelectorAll("[data-sure]")) {
    button.setAttribute("aria-pressed", String(Number(button.dataset.sure) === value));
  }
}

function guide(shown) {
  const had = $("guidelines").contains(document.activeElement);
  $("guidelines").hidden = !shown;
  $("guide").setAttribute("aria-expanded", String(shown));
  if (shown) $("guidelines").focus();
  else if (had) $("guide").focus();
}

function toggle(name) {
  if (name === "differ" && !differences.supported) return;
  state[name] = !state[name];
  $(name === "raw" ? "raw" : "diff").setAttribute("aria-pressed", String(state[name]));
  if (state.pair) paint();
}

// Keys and buttons

const acts = {
  arrowleft: () => choose("left"),
  arrowright: () => choose("right"),
  t: () => choose("tie"),
  b: () => choose("both_bad"),
  s: () => choose("skip"),
  u: back,
  n: onward,
  1: () => (sure(pressed() === 1 ? null : 1), keep()),
  2: () => (sure(pressed() === 2 ? null : 2), keep()),
  3: () => (sure(pressed() === 3 ? null : 3), keep()),
  c: () => (open("commenting", true), $("comment").focus()),
  e: () => (open("editing", true), $("edited").focus()),
  d: () => toggle("differ"),
  r: () => toggle("raw"),
  g: () => guide($("guidelines").hidden),
  j: () => state.judge && verdict($("verdict").hidden),
  "?": () => $("keys").showModal(),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  const writing = event.target.matches("textarea, input");
  if (event.key === "Escape" && !$("keys").open) {
    if (writing) leave();
    else if (!$("guidelines").hidden) guide(false);
    else verdict(false);
    return;
  }
  if (writing || $("keys").open || event.repeat || localStorage.getItem("rlaif:keys") === "off") return;
  // Arrows scroll a wide table or listing that has the focus.
  if (event.key.startsWith("Arrow") && event.target.closest("pre, .wide, aside")) return;
  const act = acts[event.key.toLowerCase()];
  if (!act) return;
  event.preventDefault();
  act();
});

const click = (id, act) => $(id).addEventListener("click", act);
for (const button of document.querySelectorAll(".choice")) button.addEventListener("click", () => choose(button.dataset.choice));
for (const button of document.querySelectorAll("[data-sure]")) button.addEventListener("click", () => acts[button.dataset.sure]());
for (const [id, key] of Object.entries({ undo: "u", onward: "n", say: "c", write: "e", diff: "d", raw: "r", guide: "g", judge: "j", help: "?" })) click(id, () => acts[key]());
click("guide-close", () => guide(false));
click("keys-close", () => $("keys").close());
click("edit-done", leave);
click("edit-drop", () => (($("edited").value = ""), keep(), leave()));
click("from-left", () => startFrom("left"));
click("from-right", () => startFrom("right"));
for (const id of ["comment", "edited"]) $(id).addEventListener("input", keep);
$("single").checked = localStorage.getItem("rlaif:keys") !== "off";
$("single").addEventListener("change", () => localStorage.setItem("rlaif:keys", $("single").checked ? "on" : "off"));
$("diff").hidden = !differences.supported;
document.addEventListener("visibilitychange", () => {
  state.seen = looked();
  state.since = document.hidden ? 0 : performance.now();
});

async function start() {
  state.tab = await kept.tabName();
  for (const tab of [state.tab, ...(await kept.orphans(state.tab))]) {
    const label = kept.pending(tab);
    if (!label) continue;
    try {
      await send(label, tab);
      state.behind = [...state.behind.filter((id) => id !== label.id), label.id];
    } catch (error) {
      trouble(`A choice from before was not saved: ${error.message}`);
    }
  }
  await move();
}

start().catch((error) => trouble(error.message));
