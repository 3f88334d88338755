// Turns a pair into document nodes. Only HTML that the server has sanitized is set as HTML; the rest is set as text.

const MAX_INITIAL_CHARS = 100_000; // a longer plain text shows the rest on request
const policy = globalThis.trustedTypes?.createPolicy("rlaif", { createHTML: (html) => html });
const safe = (html) => policy?.createHTML(html) ?? html;

export function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key in node && key !== "role") node[key] = value;
    else node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}

// An answer: formatted, or as plain text if `raw` or if it is too long to format.
export function body(text, raw) {
  if (!text.text.trim()) return element("p", { className: "hint", textContent: "(empty)" });
  if (!raw && text.html !== null) {
    const node = element("div", { className: "markdown", dir: "auto" });
    node.innerHTML = safe(text.html);
    return node;
  }
  const node = element("pre", { className: "plain", dir: "auto", textContent: text.text.slice(0, MAX_INITIAL_CHARS) });
  if (text.text.length <= MAX_INITIAL_CHARS) return node;
  const rest = (text.text.length - MAX_INITIAL_CHARS).toLocaleString();
  const more = element("button", { type: "button", textContent: `Show the remaining ${rest} characters` });
  more.addEventListener("click", () => {
    node.append(text.text.slice(MAX_INITIAL_CHARS));
    more.remove();
  });
  return element("div", {}, node, more);
}

// The prompt: its last turn in full, the system prompt and earlier turns collapsed.
export function prompt(turns, raw) {
  const node = document.createDocumentFragment();
  const before = turns.slice(0, -1);
  if (before.length) {
    const system = before.some((turn) => turn.role === "system");
    const rest = before.filter((turn) => turn.role !== "system").length;
    const parts = [system && "system prompt", rest && `${rest} earlier ${rest === 1 ? "turn" : "turns"}`].filter(Boolean);
    const fold = element("details", {}, element("summary", { textContent: parts.join(" and ") }));
    for (const turn of before) fold.append(element("h3", { textContent: turn.role }), body(turn, raw));
    node.append(fold);
  }
  node.append(element("div", { className: "last-turn", tabIndex: 0 }, body(turns.at(-1), raw)));
  return node;
}
