// What is chosen, and what pointer and keyboard do to it.

const state = {
  head: 0,
  map: null,
  direction: "out",
  // A cell {q, k}, and `token` where a token was chosen and not a cell.
  kept: null,
  seen: null,
};
const active = () => state.seen ?? state.kept;

let frameAsked = false;
function refresh() {
  if (frameAsked) return;
  frameAsked = true;
  requestAnimationFrame(() => {
    frameAsked = false;
    if (!state.map) return;
    const cell = active();
    drawMap(state.map, cell);
    paintTokens(state.map, state.direction, cell);
    fillLists(state.map, cell);
    fillReadout(state.map, cell);
  });
}

async function chooseHead(head) {
  state.head = head;
  markHead(head);
  $("map-title").textContent = headName(head);
  $("map-panel").setAttribute("aria-busy", "true");
  let map;
  try {
    map = await load(head);
  } catch (error) {
    report(error);
    return;
  }
  // Another head was chosen while this one was unpacked.
  if (state.head !== head) return;
  state.map = map;
  canvas.setAttribute("aria-label", `Map of ${headName(head)}`);
  state.kept = again(state.kept) ?? again({ q: T - 1, k: T - 1, token: T - 1, side: "out" });
  state.seen = again(state.seen);
  recolorMap();
  $("map-panel").setAttribute("aria-busy", "false");
}

// A chosen token meets another one in another head.
function again(cell) {
  return cell?.side ? cellOf(cell.side, cell.token) : cell;
}

// The cell that a token stands for: as a query its strongest key, as a key its strongest query.
function cellOf(side, token) {
  const weights = side === "out" ? state.map.row(token) : state.map.column(token);
  const best = largestAt(weights);
  const other = weights[best] > 0 ? best : null;
  return side === "out"
    ? { q: token, k: other, token, side }
    : { q: other, k: token, token, side };
}

function step(by) {
  const place = order.indexOf(state.head) + by;
  chooseHead(order[(place + order.length) % order.length]);
}

function report(error) {
  $("problem").textContent = `This page cannot show its maps: ${error.message ?? error}`;
  $("problem").hidden = false;
}

function listenToHeads() {
  const list = $("heads");
  list.addEventListener("click", (event) => {
    const option = event.target.closest(".head");
    if (option) chooseHead(Number(option.id.slice(5)));
  });
  list.addEventListener("keydown", (event) => {
    const place = order.indexOf(state.head);
    const wide = headColumns();
    const to = {
      ArrowRight: place + 1,
      ArrowLeft: place - 1,
      ArrowDown: place + wide,
      ArrowUp: place - wide,
      Home: 0,
      End: order.length - 1,
    }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    if (to < 0 || to >= order.length) return;
    chooseHead(order[to]);
    thumbnails[order[to]].option.focus({ preventScroll: true });
  });
  $("order").addEventListener("change", arrangeHeads);
  $("turn").addEventListener("click", () => {
    $("turn").dataset.rising = $("turn").dataset.rising === "yes" ? "no" : "yes";
    arrangeHeads();
  });
  $("before").addEventListener("click", () => step(-1));
  $("after").addEventListener("click", () => step(1));
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "[" || event.key === "]") step(event.key === "[" ? -1 : 1);
  });
}

function keepCell(cell) {
  state.kept = cell;
  if (!same) revealToken("keys", cell.k);
  revealToken("queries", same && state.direction === "in" ? cell.k : cell.q);
}

function zoom(factor, px, py) {
  zoomTo(frame.zoom * factor, px, py);
  refresh();
}

function listenToMap() {
  let from = null;
  canvas.addEventListener("pointerdown", (event) => {
    from = { px: event.clientX, py: event.clientY, x: frame.x, y: frame.y, moved: false };
  });
  canvas.addEventListener("pointermove", (event) => {
    if (from && event.buttons && frame.zoom > 1) {
      const [dx, dy] = [event.clientX - from.px, event.clientY - from.py];
      if (!from.moved && Math.hypot(dx, dy) > 4) {
        from.moved = true;
        canvas.setPointerCapture(event.pointerId);
      }
      if (from.moved) moveTo(from.x - dx / frame.cellX, from.y - dy / frame.cellY);
    }
    state.seen = cellAt(event);
    refresh();
  });
  canvas.addEventListener("pointerleave", () => {
    state.seen = null;
    refresh();
  });
  canvas.addEventListener("click", (event) => {
    const cell = cellAt(event);
    if (cell && !from?.moved) keepCell(cell);
    from = null;
    refresh();
  });
  canvas.addEventListener(
    "wheel",
    (event) => {
      if (!event.ctrlKey && !event.metaKey) return;
      event.preventDefault();
      const box = canvas.getBoundingClientRect();
      zoom(Math.exp(-event.deltaY / 200), event.clientX - box.left, event.clientY - box.top);
    },
    { passive: false },
  );
  const zoomAtCell = (factor) => {
    const { q, k } = active();
    zoom(factor, leftOf((k ?? 0) + 0.5), topOf((q ?? 0) + 0.5));
    reveal({ q: q ?? 0, k: k ?? 0 });
  };
  $("closer").addEventListener("click", () => zoomAtCell(2));
  $("farther").addEventListener("click", () => zoomAtCell(0.5));
  $("whole").addEventListener("click", () => zoomAtCell(0));
  canvas.addEventListener("keydown", (event) => {
    const factor = { "+": 2, "=": 2, "-": 0.5, 0: 0 }[event.key];
    const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const by = move[event.key];
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (factor !== undefined) zoomAtCell(factor);
    if (by) {
      const { q, k } = active();
      const inside = (i, size) => Math.min(Math.max(i, 0), size - 1);
      state.seen = null;
      keepCell({ q: inside((q ?? 0) + by[0], T), k: inside((k ?? 0) + by[1], S) });
      reveal(state.kept);
      refresh();
    }
    if (by || factor !== undefined) event.preventDefault();
  });
}

function listenToTokens(name) {
  const flow = $(name);
  const side = () => (same ? state.direction : name === "queries" ? "out" : "in");
  const find = (event) => event.target.closest?.(".token");
  const keep = (i) => {
    state.seen = null;
    state.kept = cellOf(side(), i);
    refresh();
  };
  flow.addEventListener("pointerover", (event) => {
    const span = find(event);
    if (!span || !state.map) return;
    state.seen = cellOf(side(), Number(span.dataset.index));
    refresh();
  });
  flow.addEventListener("pointerleave", () => {
    state.seen = null;
    refresh();
  });
  flow.addEventListener("click", (event) => {
    const span = find(event);
    if (span) keep(Number(span.dataset.index));
  });
  flow.addEventListener("focusin", (event) => {
    if (event.target.matches(":focus-visible")) keep(Number(event.target.dataset.index));
  });
  flow.addEventListener("keydown", (event) => {
    const to = neighbour(name, Number(event.target.dataset.index), event.key);
    if (to === null) return;
    event.preventDefault();
    spans[name][to].focus({ preventScroll: true });
    keep(to);
    revealToken(name, to);
  });
}

function listenToDirections() {
  for (const radio of document.querySelectorAll("[name=direction]")) {
    radio.addEventListener("change", () => {
      state.direction = radio.value;
      if (state.kept.side) state.kept = cellOf(radio.value, state.kept.token);
      refresh();
    });
  }
}

function recolorMap() {
  if (!state.map) return;
  fitColors(state.map);
  drawLegend();
  paintPicture(state.map);
  refresh();
}

function recolor() {
  chooseColors();
  chooseInks();
  paintThumbnails();
  recolorMap();
}

async function start() {
  const many = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;
  const size = same ? many(T, "token") : `${many(T, "query token")} × ${many(S, "key token")}`;
  $("viewer").hidden = false;
  chooseColors();
  chooseInks();
  buildTokens();
  await buildHeads();
  layout();
  listenToHeads();
  listenToMap();
  for (const name of same ? ["queries"] : ["queries", "keys"]) listenToTokens(name);
  listenToDirections();
  $("colour").addEventListener("change", () => {
    colorScale.mode = $("colour").value;
    recolorMap();
  });
  $("scheme").addEventListener("click", () => {
    document.documentElement.dataset.scheme = isDark() ? "light" : "dark";
    recolor();
  });
  scheme.addEventListener("change", recolor);
  new ResizeObserver(() => {
    layout();
    refresh();
  }).observe($("map-panel"));
  await chooseHead(0);
  $("facts").textContent = `${many(L, "layer")} × ${many(N, "head")} · ${size}`;
}

start().catch(report);
