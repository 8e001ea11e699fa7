// The tokens: where one looks, what looks at it, and the strongest of either.

const STRONGEST = 6;
const spans = { queries: [], keys: [] };
// Which span each flow marks as chosen and as met: few spans change from one to the next.
const marked = { queries: {}, keys: {} };

function buildTokens() {
  $("flows").classList.toggle("same", same);
  $("keys").hidden = same;
  $("directions").hidden = !same;
  if (same) $("queries-title").textContent = "Tokens";
  fill("queries", queries);
  if (!same) fill("keys", keys);
}

function fill(name, tokens) {
  const all = document.createDocumentFragment();
  for (const [i, token] of tokens.entries()) {
    const span = make("span", "token");
    span.setAttribute("role", "option");
    span.setAttribute("aria-selected", "false");
    span.dataset.index = i;
    span.tabIndex = -1;
    for (const part of token.split(/([␣⏎⇥␍]+)/))
      if (part) span.append(/[␣⏎⇥␍]/.test(part[0]) ? make("span", "mark", part) : part);
    all.append(span);
    // The text keeps its lines.
    if (token.endsWith("⏎")) all.append(make("br"));
    spans[name].push(span);
  }
  $(name).append(all);
}

// Colour tokens by weights; `chosen` is who looks or is looked at, `met` the other end.
function paint(name, weights, largestOf, chosen, met) {
  for (const [i, span] of spans[name].entries()) {
    const weight = weights ? weights[i] : 0;
    const at = weight > 0 ? shade(weight, largestOf(i)) : -1;
    const background = at < 0 ? "" : colorScale.css[at];
    if (span.shown === background) continue;
    span.shown = span.style.backgroundColor = background;
    span.style.color = at < 0 ? "" : colorScale.ink[at];
  }
  const before = marked[name];
  for (const i of [before.chosen, before.met, before.tab]) {
    const span = spans[name][i];
    if (!span) continue;
    span.classList.remove("chosen", "met");
    span.setAttribute("aria-selected", "false");
    span.tabIndex = -1;
  }
  marked[name] = { chosen, met, tab: chosen ?? 0 };
  spans[name][chosen]?.setAttribute("aria-selected", "true");
  spans[name][chosen]?.classList.add("chosen");
  if (met !== chosen) spans[name][met]?.classList.add("met");
  spans[name][chosen ?? 0].tabIndex = 0;
}

function paintTokens(map, direction, { q, k }) {
  const row = q === null ? null : map.row(q);
  const column = k === null ? null : map.column(k);
  const ofRow = () => map.largest[q];
  const ofColumn = (i) => map.largest[i];
  if (!same) {
    paint("queries", column, ofColumn, q, null);
    paint("keys", row, ofRow, k, null);
  } else if (direction === "out") {
    paint("queries", row, ofRow, q, k);
  } else {
    paint("queries", column, ofColumn, k, q);
  }
}

// A token is both query and key where both are the same text; a cell names one of each.
function fillLists(map, { q, k, token }) {
  const query = (same ? token : null) ?? q;
  const key = (same ? token : null) ?? k;
  list("out", queries[query], "looks at", keys, query === null ? [] : map.row(query));
  list("in", keys[key], "is looked at by", queries, key === null ? [] : map.column(key));
}

function list(name, token, verb, tokens, weights) {
  const title = $(`${name}-title`);
  title.replaceChildren(make("b", "", token ?? "–"), make("span", "", verb));
  title.title = token ?? "";
  const best = [...weights.keys()].filter((i) => weights[i] > 0);
  best.sort((a, b) => weights[b] - weights[a] || a - b);
  $(name).replaceChildren(
    ...best.slice(0, STRONGEST).map((i) => {
      const item = make("li");
      item.style.setProperty("--share", `${Math.max(1, (100 * weights[i]) / weights[best[0]])}%`);
      item.append(
        make("span", "", tokens[i]),
        make("small", "", i),
        make("b", "", column3(weights[i])),
      );
      return item;
    }),
  );
  if (!best.length) $(name).append(make("li", "nothing", "nothing: every weight is 0"));
}

function chip(element, tokens, i) {
  element.replaceChildren(make("span", "", i === null ? "–" : tokens[i]));
  if (i !== null) element.append(make("small", "", i));
  element.title = i === null ? "" : tokens[i];
}

function fillReadout(map, { q, k }) {
  chip($("query"), queries, q);
  chip($("key"), keys, k);
  const both = q !== null && k !== null;
  $("verb").textContent = both || q === null ? "looks at" : "looks at nothing";
  $("key").hidden = q !== null && k === null;
  const weight = both ? map.weight(q, k) : 0;
  const error = both ? map.error(q, k) : 0;
  $("value").textContent = both ? exact(weight, error) : "";
  $("accuracy").textContent = error >= UNSEEN ? `± ${error.toPrecision(1).replace("e-", "e−")}` : "";
}

// Scroll the tokens, and never the page, to one of them.
function revealToken(name, i) {
  const box = $("flows");
  const { offsetTop, offsetHeight } = spans[name][i];
  if (offsetTop < box.scrollTop) box.scrollTop = offsetTop - 4;
  const below = offsetTop + offsetHeight - box.clientHeight;
  if (below > box.scrollTop) box.scrollTop = below + 4;
}

// Step to the token beside, or to the nearest one on the line above or below.
function neighbour(name, i, keyName) {
  const all = spans[name];
  const step = { ArrowRight: 1, ArrowLeft: -1 }[keyName];
  if (step) return Math.min(Math.max(i + step, 0), all.length - 1);
  if (keyName === "Home") return 0;
  if (keyName === "End") return all.length - 1;
  const way = { ArrowDown: 1, ArrowUp: -1 }[keyName];
  if (!way) return null;
  const middle = all[i].offsetLeft + all[i].offsetWidth / 2;
  let line = null;
  let best = i;
  let gap = Infinity;
  for (let j = i + way; j >= 0 && j < all.length; j += way) {
    const { offsetTop, offsetLeft, offsetWidth } = all[j];
    if (Math.abs(offsetTop - all[i].offsetTop) < 4) continue;
    line ??= offsetTop;
    if (Math.abs(offsetTop - line) >= 4) break;
    const away = Math.abs(offsetLeft + offsetWidth / 2 - middle);
    if (away < gap) [gap, best] = [away, j];
  }
  return best;
}
