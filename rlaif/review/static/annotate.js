// The labeling page. It keeps a choice in the browser and sends it. It shows the next pair, which is already loaded, only
// when the server has written the label to disk. If the server does not answer, the page stays and sends the choice again.

import * as differences from "./differences.js";
import * as drafts from "./drafts.js";
import { get, post, RejectedError } from "./server.js";
import { body, element, prompt } from "./text.js";

const PREFETCHED_PAIRS = 4;
const POLL_INTERVAL_MS = 5000;
const $ = (id) => document.getElementById(id);
const CHOICE_TEXT = { left: "left is better", right: "right is better", tie: "tie", both_bad: "both bad", skip: "skipped" };

const state = {
  tab: "",
  pair: null, // on display
  upcoming: [], // prefetched pairs
  history: document.body.dataset.history.split(",").filter(Boolean),
  busy: false,
  raw: false,
  differences: false,
  viewedMs: 0, // time the pair was visible until viewedSince, in milliseconds
  viewedSince: 0,
  judge: null,
};

// Display

function showPair(pair) {
  state.pair = pair;
  state.viewedMs = 0;
  state.viewedSince = document.hidden ? 0 : performance.now();
  $("empty").hidden = true;
  $("pair").hidden = $("controls").hidden = false;
  renderPair();
  const draft = { ...(pair.own_label ?? {}), ...drafts.loadDraft(pair.id) };
  $("comment").value = draft.comment ?? "";
  $("edited").value = draft.edited_response ?? "";
  setConfidence(draft.confidence ?? null);
  toggleEditor("commenting", Boolean(draft.comment));
  toggleEditor("editing", Boolean(draft.edited_response));
  setPressedChoice(pair.own_label?.choice);
  $("forward").hidden = !pair.own_label;
  scrollTo(0, 0);
}

function setPressedChoice(choice) {
  for (const button of document.querySelectorAll(".choice")) button.setAttribute("aria-pressed", String(button.dataset.choice === choice));
}

function renderPair() {
  const { pair, raw } = state;
  differences.supported && differences.hide();
  $("prompt").replaceChildren(prompt(pair.turns, raw));
  for (const side of ["left", "right"]) $(side).querySelector(".text").replaceChildren(body(pair[side], raw));
  renderVotes(pair.votes);
  if (state.differences) differences.show($("left").querySelector(".text"), $("right").querySelector(".text"));
}

function renderVotes(list) {
  $("votes").hidden = !list;
  if (!list) return;
  const lines = list.map((vote) => {
    const certainty = ["", ", guess", ", fairly sure", ", certain"][vote.confidence ?? 0];
    const line = element("li", {}, element("b", { textContent: vote.annotator }), `: ${CHOICE_TEXT[vote.choice]}${certainty}`);
    if (vote.comment) line.append(element("q", { textContent: vote.comment }));
    if (vote.edited_response) line.append(element("details", {}, element("summary", { textContent: "wrote a better answer" }), body({ text: vote.edited_response, html: null }, true)));
    return line;
  });
  $("votes").replaceChildren(element("h2", { textContent: "Annotators' labels" }), element("ul", {}, ...lines));
}

function showEmpty() {
  state.pair = null;
  $("pair").hidden = $("controls").hidden = true;
  $("empty-title").textContent = document.body.dataset.lead ? "No open disagreements" : "No pairs left for you";
  $("empty-text").textContent = state.history.length
    ? `You have labeled ${state.history.length.toLocaleString()} pairs. All labels are saved.`
    : "The review queue is empty, or other annotators have labeled every pair. New pairs appear here by themselves.";
  $("empty-undo").hidden = !state.history.length;
  $("empty").hidden = false;
  $("empty").focus();
  setTimeout(pollForPairs, POLL_INTERVAL_MS);
}

// New pairs can appear: from judging, or because another annotator skipped or left them.
async function pollForPairs() {
  if (state.pair || state.busy) return;
  await refill().catch(() => {});
  if (state.pair || state.busy) return;
  if (state.upcoming.length) await nextPair();
  else setTimeout(pollForPairs, POLL_INTERVAL_MS);
}

function showProgress({ done, remaining }) {
  $("bar").value = done + remaining ? done / (done + remaining) : 1;
  $("count").textContent = `${done.toLocaleString()} done, ${remaining.toLocaleString()} to go`;
}

function showError(text) {
  $("error").hidden = !text;
  $("error-text").textContent = text ? `${text[0].toUpperCase()}${text.slice(1)}` : "";
}

// Loading pairs

let pendingRefill = null;

function refill() {
  pendingRefill ??= (async () => {
    try {
      const loaded = [state.pair, ...state.upcoming].filter(Boolean).map((pair) => pair.id);
      const result = await get("next", { tab: state.tab, loaded: loaded.join(","), count: PREFETCHED_PAIRS });
      const loadedIds = new Set(loaded);
      state.upcoming.push(...result.items.filter((pair) => !loadedIds.has(pair.id)));
      showProgress(result.progress);
    } finally {
      pendingRefill = null;
    }
  })();
  return pendingRefill;
}

async function nextPair() {
  if (!state.upcoming.length) await retryUntilAnswered(refill);
  const next = state.upcoming.shift();
  if (next) showPair(next);
  else showEmpty();
  if (state.upcoming.length <= PREFETCHED_PAIRS / 2) refill().catch(() => {}); // nextPair() tries again when it needs a pair
}

// Call `act` until the server answers, and show the error meanwhile. Retry at once when the network is back or the
// annotator clicks "Retry now". A RejectedError is final.
async function retryUntilAnswered(act) {
  for (let wait = 400; ; wait = Math.min(wait * 1.6, 5000)) {
    try {
      const result = await act();
      showError(null);
      return result;
    } catch (error) {
      if (error instanceof RejectedError) throw error;
      const why = error.message && !(error instanceof TypeError) ? error.message : "The server is not responding";
      showError(`${why}. Your choice and text are kept in this browser; the page keeps retrying.`);
      await new Promise((done) => {
        const again = () => (clearTimeout(timer), removeEventListener("online", again), $("retry").removeEventListener("click", again), done());
        const timer = setTimeout(again, wait);
        addEventListener("online", again);
        $("retry").addEventListener("click", again);
      });
    }
  }
}

// Labels

async function choose(choice) {
  if (state.busy || !state.pair) return;
  const pair = state.pair;
  const label = {
    id: pair.id,
    choice,
    comment: $("comment").value,
    edited_response: $("edited").value.trim() ? $("edited").value : null,
    confidence: selectedConfidence(),
    seconds: Math.round(viewedMilliseconds() / 100) / 10,
  };
  state.busy = true;
  document.body.classList.add("busy");
  drafts.savePending(state.tab, label);
  setPressedChoice(choice);
  try {
    await send(label, state.tab);
    state.history = [...state.history.filter((id) => id !== pair.id), pair.id];
    await nextPair();
    $("announcement").textContent = `Saved: ${CHOICE_TEXT[choice]}. ${state.pair ? "Next pair." : ""}`;
  } catch (error) {
    setPressedChoice(pair.own_label?.choice);
    showError(`Not saved: ${error.message}. Your text is kept.`);
  } finally {
    state.busy = false;
    document.body.classList.remove("busy");
  }
}

async function send(label, tab) {
  let saved;
  try {
    saved = await retryUntilAnswered(() => post("label", label));
  } catch (error) {
    drafts.deletePending(tab); // rejected for good: keep the draft so that no text is lost
    drafts.saveDraft(label.id, { comment: label.comment, edited_response: label.edited_response, confidence: label.confidence });
    throw error;
  }
  drafts.deletePending(tab);
  drafts.deleteDraft(label.id);
  showProgress(saved.progress);
  state.judge = saved.judge;
  $("after").hidden = false;
  $("saved").textContent = `Saved: ${CHOICE_TEXT[label.choice]}.`;
  showVerdict(false);
}

async function goBack() {
  if (state.busy || !state.history.length) return;
  state.busy = true;
  try {
    const id = state.history.at(-1);
    const pair = await retryUntilAnswered(() => get("item", { id }));
    state.history.pop();
    if (state.pair) state.upcoming.unshift(state.pair);
    showPair(pair);
    $("announcement").textContent = `Previous pair. Your label: ${CHOICE_TEXT[pair.own_label?.choice] ?? "none"}.`;
  } catch (error) {
    showError(error.message);
  } finally {
    state.busy = false;
  }
}

async function goForward() {
  if (state.busy || !state.pair?.own_label) return;
  state.history.push(state.pair.id);
  await nextPair();
}

function viewedMilliseconds() {
  return state.viewedMs + (state.viewedSince ? performance.now() - state.viewedSince : 0);
}

function showVerdict(shown) {
  const { prob_left: p, reason } = state.judge ?? {};
  const preference = p == null ? "no verdict from the judges." : p === 0.5 ? "the judges saw no difference."
    : `the judges preferred the ${p > 0.5 ? "left" : "right"} answer (p = ${Math.max(p, 1 - p).toFixed(2)}).`;
  $("verdict").textContent = `Previous pair: ${preference}${reason ? ` Queued for review as ${reason}.` : ""}`;
  $("verdict").hidden = !shown;
  $("judge").setAttribute("aria-expanded", String(shown));
}

// Comment, better answer and confidence

function toggleEditor(part, shown) {
  $(part).hidden = !shown;
  $("writing").hidden = $("editing").hidden && $("commenting").hidden;
  $(part === "editing" ? "edit-button" : "comment-button").setAttribute("aria-expanded", String(shown));
}

function saveDraft() {
  if (!state.pair) return;
  drafts.saveDraft(state.pair.id, { comment: $("comment").value, edited_response: $("edited").value, confidence: selectedConfidence() });
}

function closeEditors() {
  if (!$("edited").value.trim()) toggleEditor("editing", false);
  if (!$("comment").value.trim()) toggleEditor("commenting", false);
  document.activeElement?.blur();
}

function startFrom(side) {
  const text = state.pair[side].text;
  const field = $("edited");
  if (field.value.trim() && field.value !== text && !confirm("Replace your text?")) return;
  field.value = text;
  saveDraft();
  field.focus();
  field.setSelectionRange(0, 0);
}

const selectedConfidence = () => {
  const button = document.querySelector("[data-confidence][aria-pressed=true]");
  return button ? Number(button.dataset.confidence) : null;
};

function setConfidence(value) {
  for (const button of document.querySelectorAll("[data-confidence]")) {
    button.setAttribute("aria-pressed", String(Number(button.dataset.confidence) === value));
  }
}

function showGuidelines(shown) {
  const hadFocus = $("guidelines").contains(document.activeElement);
  $("guidelines").hidden = !shown;
  $("guidelines-button").setAttribute("aria-expanded", String(shown));
  if (shown) $("guidelines").focus();
  else if (hadFocus) $("guidelines-button").focus();
}

function toggleView(name) {
  if (name === "differences" && !differences.supported) return;
  state[name] = !state[name];
  $(name === "raw" ? "raw" : "diff").setAttribute("aria-pressed", String(state[name]));
  if (state.pair) renderPair();
}

// Keys and buttons

const keyActions = {
  arrowleft: () => choose("left"),
  arrowright: () => choose("right"),
  t: () => choose("tie"),
  b: () => choose("both_bad"),
  s: () => choose("skip"),
  u: goBack,
  n: goForward,
  1: () => (setConfidence(selectedConfidence() === 1 ? null : 1), saveDraft()),
  2: () => (setConfidence(selectedConfidence() === 2 ? null : 2), saveDraft()),
  3: () => (setConfidence(selectedConfidence() === 3 ? null : 3), saveDraft()),
  c: () => (toggleEditor("commenting", true), $("comment").focus()),
  e: () => (toggleEditor("editing", true), $("edited").focus()),
  d: () => toggleView("differences"),
  r: () => toggleView("raw"),
  g: () => showGuidelines($("guidelines").hidden),
  j: () => state.judge && showVerdict($("verdict").hidden),
  "?": () => $("keys").showModal(),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  const writing = event.target.matches("textarea, input");
  if (event.key === "Escape" && !$("keys").open) {
    if (writing) closeEditors();
    else if (!$("guidelines").hidden) showGuidelines(false);
    else showVerdict(false);
    return;
  }
  if (writing || $("keys").open || event.repeat || localStorage.getItem("rlaif:keys") === "off") return;
  // The arrow keys scroll a focused table or code block.
  if (event.key.startsWith("Arrow") && event.target.closest("pre, .wide, aside")) return;
  const act = keyActions[event.key.toLowerCase()];
  if (!act) return;
  event.preventDefault();
  act();
});

const onClick = (id, act) => $(id).addEventListener("click", act);
for (const button of document.querySelectorAll(".choice")) button.addEventListener("click", () => choose(button.dataset.choice));
for (const button of document.querySelectorAll("[data-confidence]")) button.addEventListener("click", () => keyActions[button.dataset.confidence]());
for (const [id, key] of Object.entries({ undo: "u", "empty-undo": "u", forward: "n", "comment-button": "c", "edit-button": "e", diff: "d", raw: "r", "guidelines-button": "g", judge: "j", help: "?" })) onClick(id, () => keyActions[key]());
onClick("guidelines-close", () => showGuidelines(false));
onClick("keys-close", () => $("keys").close());
onClick("edit-done", closeEditors);
onClick("edit-drop", () => (($("edited").value = ""), saveDraft(), closeEditors()));
onClick("from-left", () => startFrom("left"));
onClick("from-right", () => startFrom("right"));
for (const id of ["comment", "edited"]) $(id).addEventListener("input", saveDraft);
$("single").checked = localStorage.getItem("rlaif:keys") !== "off";
$("single").addEventListener("change", () => localStorage.setItem("rlaif:keys", $("single").checked ? "on" : "off"));
$("diff").hidden = !differences.supported;
document.addEventListener("visibilitychange", () => {
  state.viewedMs = viewedMilliseconds();
  state.viewedSince = document.hidden ? 0 : performance.now();
});

async function start() {
  state.tab = await drafts.tabName();
  for (const tab of [state.tab, ...(await drafts.orphanedTabs(state.tab))]) {
    const label = drafts.loadPending(tab);
    if (!label) continue;
    try {
      await send(label, tab);
      state.history = [...state.history.filter((id) => id !== label.id), label.id];
    } catch (error) {
      showError(`A label from an earlier visit was not saved: ${error.message}`);
    }
  }
  await nextPair();
}

start().catch((error) => showError(error.message));
