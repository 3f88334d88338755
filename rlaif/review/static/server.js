// Requests to the annotator's own URLs. A RejectedError (HTTP 4xx) is final: retrying does not help.

const base = location.pathname.replace(/[^/]*$/, "");
const csrf = document.querySelector("meta[name=csrf]").content;

export const annotator = csrf; // unique per run and annotator: the key prefix in browser storage

export class RejectedError extends Error {}

async function ask(path, options = {}) {
  const response = await fetch(`${base}api/${path}`, { signal: AbortSignal.timeout(20000), ...options });
  const body = await response.json().catch(() => ({ error: response.statusText }));
  if (response.ok) return body;
  const message = [body.error, body.hint].filter(Boolean).map((part) => part.replace(/\.$/, "")).join(". ");
  throw response.status < 500 ? new RejectedError(message) : new Error(message);
}

export const get = (path, query = {}) => ask(`${path}?${new URLSearchParams(query)}`);

export const post = (path, value) =>
  ask(path, {
    method: "POST",
    headers: { "content-type": "application/json", "x-csrf-token": csrf },
    body: JSON.stringify(value),
  });
