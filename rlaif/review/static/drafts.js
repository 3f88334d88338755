// Browser storage for unsent input: one draft per pair, and the one label being sent.

import { annotator } from "./server.js";

const draftName = (pair) => `rlaif:${annotator}:draft:${pair}`;
const pendingName = `rlaif:${annotator}:pending`;

function read(name) {
  try {
    return JSON.parse(localStorage.getItem(name));
  } catch {
    return null;
  }
}

function write(name, value) {
  try {
    localStorage.setItem(name, JSON.stringify(value));
  } catch (error) {
    console.warn("cannot save to browser storage:", error.name);
  }
}

export const loadDraft = (pair) => read(draftName(pair)) ?? {};
export const saveDraft = (pair, value) => write(draftName(pair), value);
export const deleteDraft = (pair) => localStorage.removeItem(draftName(pair));
// Stored per tab: two tabs of one annotator do not send each other's labels, and a reload keeps the tab's label.
export const loadPending = (tab) => read(`${pendingName}:${tab}`);
export const savePending = (tab, label) => write(`${pendingName}:${tab}`, label);
export const deletePending = (tab) => localStorage.removeItem(`${pendingName}:${tab}`);

// Names of closed tabs that left an unsent label. An open tab holds the lock of its name.
export async function orphanedTabs(tab) {
  const prefix = `${pendingName}:`;
  const names = Object.keys(localStorage).filter((name) => name.startsWith(prefix) && name !== prefix + tab);
  const held = navigator.locks ? (await navigator.locks.query()).held.map((lock) => lock.name) : [];
  return names.map((name) => name.slice(prefix.length)).filter((other) => !held.includes(`rlaif:${other}`));
}

// The tab's name. A reload keeps it; a duplicated tab gets a new one.
export async function tabName() {
  const fresh = () => Array.from(crypto.getRandomValues(new Uint8Array(8)), (byte) => byte.toString(16).padStart(2, "0")).join("");
  let name = sessionStorage.getItem("rlaif:tab") ?? fresh();
  if (navigator.locks) {
    const held = (requested) =>
      new Promise((resolve) => {
        navigator.locks.request(`rlaif:${requested}`, { ifAvailable: true }, (lock) => {
          resolve(lock !== null);
          return lock ? new Promise(() => {}) : undefined; // until the tab is closed
        });
      });
    if (!(await held(name))) {
      name = fresh();
      await held(name);
    }
  }
  sessionStorage.setItem("rlaif:tab", name);
  return name;
}
