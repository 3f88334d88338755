// Highlights the words that differ between two answers, without changing the document.
// Myers' greedy algorithm on words (Myers 1986), after a common beginning and end are removed. If two texts have too
// little in common for it, a word differs when the other text does not contain it at all.

const MAX_EDITS = 1200;
const MAX_WORDS = 30_000; // per answer: more than anyone reads, and few enough that the page does not stall
const WORD = /[\p{L}\p{N}_]+|[^\s\p{L}\p{N}_]/gu;

export const supported = typeof Highlight === "function" && CSS.highlights !== undefined;

export function show(left, right) {
  const [a, b] = [words(left), words(right)];
  const [inA, inB] = differing(a.map((word) => word.text), b.map((word) => word.text));
  CSS.highlights.set("differs", new Highlight(...ranges(a, inA), ...ranges(b, inB)));
}

export const hide = () => CSS.highlights.delete("differs");

function words(root) {
  const result = [];
  const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node && result.length < MAX_WORDS; node = walker.nextNode()) {
    for (const match of node.data.slice(0, 8 * MAX_WORDS).matchAll(WORD)) result.push({ text: match[0], node, start: match.index, end: match.index + match[0].length });
  }
  return result;
}

function ranges(list, marked) {
  const result = [];
  list.forEach((word, index) => {
    if (!marked[index]) return;
    const range = new StaticRange({ startContainer: word.node, startOffset: word.start, endContainer: word.node, endOffset: word.end });
    result.push(range);
  });
  return result;
}

// Return two arrays of flags: 1 for each word of a and of b that has no counterpart in the other.
export function differing(a, b) {
  const [inA, inB] = [new Uint8Array(a.length), new Uint8Array(b.length)];
  let start = 0;
  while (start < a.length && start < b.length && a[start] === b[start]) start++;
  let [endA, endB] = [a.length, b.length];
  while (endA > start && endB > start && a[endA - 1] === b[endB - 1]) endA--, endB--;
  inA.fill(1, start, endA);
  inB.fill(1, start, endB);
  const [middleA, middleB] = [a.slice(start, endA), b.slice(start, endB)];
  if (!middleA.length || !middleB.length) return [inA, inB];
  const common = alignment(middleA, middleB);
  if (common) {
    for (const [x, y] of common) (inA[start + x] = 0), (inB[start + y] = 0);
  } else {
    const [wordsA, wordsB] = [new Set(middleA), new Set(middleB)];
    middleA.forEach((word, index) => (inA[start + index] = wordsB.has(word) ? 0 : 1));
    middleB.forEach((word, index) => (inB[start + index] = wordsA.has(word) ? 0 : 1));
  }
  return [inA, inB];
}

// Index pairs of the longest common subsequence, or null if it takes more than MAX_EDITS edits.
function alignment(a, b) {
  const maxEdits = Math.min(a.length + b.length, MAX_EDITS);
  const reach = new Int32Array(2 * maxEdits + 3); // furthest index in a, by diagonal k
  const trace = [];
  for (let edits = 0; edits <= maxEdits; edits++) {
    for (let k = -edits; k <= edits; k += 2) {
      const slot = k + maxEdits + 1;
      let x = k === -edits || (k !== edits && reach[slot - 1] < reach[slot + 1]) ? reach[slot + 1] : reach[slot - 1] + 1;
      while (x < a.length && x - k < b.length && a[x] === b[x - k]) x++;
      reach[slot] = x;
      if (x >= a.length && x - k >= b.length) return walkBack(a, b, trace, edits, k);
    }
    trace.push(reach.slice(maxEdits + 1 - edits, maxEdits + 2 + edits));
  }
  return null;
}

function walkBack(a, b, trace, edits, k) {
  const common = [];
  let x = a.length;
  for (; edits > 0; edits--) {
    const before = trace[edits - 1];
    const reached = (diagonal) => (Math.abs(diagonal) <= edits - 1 ? before[diagonal + edits - 1] : -1);
    const down = k === -edits || (k !== edits && reached(k - 1) < reached(k + 1));
    const from = down ? k + 1 : k - 1;
    const begin = down ? reached(from) : reached(from) + 1;
    while (x > begin) common.push([--x, x - k]);
    x = reached(from);
    k = from;
  }
  while (x > 0) common.push([--x, x]);
  return common;
}
