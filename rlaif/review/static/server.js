// Requests to the person's own part of the server. A Refusal is an answer that trying again does not change.

const base = location.pathname.replace(/[^/]*$/, "");
const csrf = document.querySelector("meta[name=csrf]").content;

export const person = csrf; // one value for each run and person: what is kept in the browser is kept under it

export class Refusal extends Error {}

async function ask(path, options = {}) {
  const reply = await fetch(`${base}api/${path}`, { signal: AbortSignal.timeout(20000), ...options });
  const found = await reply.json().catch(() => ({ error: reply.statusText }));
  if (reply.ok) return found;
  const what = [found.error, found.mend].filter(Boolean).join(". ");
  throw reply.status < 500 ? new Refusal(what) : new Error(what);
}

export const get = (path, query = {}) => ask(`${path}?${new URLSearchParams(query)}`);

export const post = (path, value) =>
  ask(path, {
    method: "POST",
    headers: { "content-type": "application/json", "x-csrf-token": csrf },
    body: JSON.stringify(value),
  });
