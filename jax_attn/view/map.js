// The map of one head: its picture, its axes, zoom, and the cell under the pointer.

const canvas = $("map");
const paper = canvas.getContext("2d");
const picture = document.createElement("canvas");
picture.width = S;
picture.height = T;

const LABEL = 12; // px: from this cell size on every row or column carries its token
const VALUE = 38; // px: from this one on a cell carries its number
const FONT = "11.5px ui-monospace, 'SF Mono', Menlo, Consolas, 'DejaVu Sans Mono', monospace";
const SMALL = "10.5px system-ui, 'Liberation Sans', sans-serif";

// In CSS px: where the cells begin, how much room they have, how large one is.
const frame = { left: 0, top: 0, width: 0, height: 0, cellX: 1, cellY: 1, zoom: 1, x: 0, y: 0 };
const named = () => (frame.width / S) * frame.zoom >= LABEL;

// The page's colours, for the canvas. light-dark() is resolved in a property that takes a colour.
const ink = {};
function chooseInks() {
  const probe = make("span");
  document.body.append(probe);
  for (const name of ["text", "faint", "accent", "void", "panel"]) {
    probe.style.color = `var(--${name})`;
    ink[name] = getComputedStyle(probe).color;
  }
  probe.remove();
}

function paintPicture(map) {
  const image = new ImageData(S, T);
  const words = new Uint32Array(image.data.buffer);
  const table = new Uint32Array(256);
  const opaque = new DataView(table.buffer);
  for (let i = 0; i < 256; i++) {
    for (let c = 0; c < 3; c++) opaque.setUint8(4 * i + c, colorScale.rgb[3 * i + c]);
    opaque.setUint8(4 * i + 3, 255);
  }
  for (let q = 0; q < T; q++) {
    const largest = map.largest[q];
    for (let i = q * S; i < (q + 1) * S; i++) {
      const code = map.codes[i];
      // Where the weight is 0 nothing is drawn.
      if (code) words[i] = table[shade(largest * POWERS[code], largest)];
    }
  }
  picture.getContext("2d").putImageData(image, 0, 0);
}

function cut(text, room) {
  if (paper.measureText(text).width <= room) return text;
  let characters = [...text];
  while (characters.length > 1 && paper.measureText(characters.join("") + "…").width > room)
    characters = characters.slice(0, -1);
  return characters.join("") + "…";
}

function longest(tokens, room) {
  paper.font = FONT;
  return Math.min(room, tokens.reduce((w, t) => Math.max(w, paper.measureText(t).width), 0));
}

// Fit the frame to the panel; the canvas is as high as the map needs.
function layout() {
  const width = canvas.clientWidth;
  const room = Math.min(78, 0.18 * width);
  frame.left = Math.ceil(Math.max(longest(queries, room), 26)) + 10;
  const across = Math.max(width - frame.left - 2, 60);
  const most = Math.max(280, Math.min(0.86 * window.innerHeight, 1.4 * across));
  const cell = Math.min(across / S, most / T, 60);
  // A map of few rows or columns is stretched so that they can be hit.
  frame.width = S * Math.max(cell, Math.min(24, 96 / S, across / S));
  frame.height = T * Math.max(cell, Math.min(24, 96 / T, most / T));
  const column = (frame.width / S) * frame.zoom;
  const upright = column < LABEL || longest(keys, 999) <= column - 3;
  frame.top = Math.ceil(upright ? 14 : Math.max(longest(keys, room), 14)) + 10;
  const ratio = window.devicePixelRatio || 1;
  const height = Math.ceil(frame.top + frame.height + 2);
  canvas.style.height = `${height}px`;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  zoomTo(frame.zoom);
}

function zoomTo(zoom, px = frame.left + frame.width / 2, py = frame.top + frame.height / 2) {
  const [atX, atY] = [columnAt(px), rowAt(py)];
  const largest = Math.max(1, 64 / Math.max(frame.width / S, frame.height / T));
  const before = named();
  frame.zoom = Math.min(Math.max(zoom, 1), largest);
  // Tokens above the columns need more room than positions do.
  if (named() !== before) layout();
  frame.cellX = (frame.width / S) * frame.zoom;
  frame.cellY = (frame.height / T) * frame.zoom;
  moveTo(atX - (px - frame.left) / frame.cellX, atY - (py - frame.top) / frame.cellY);
  canvas.classList.toggle("zoomed", frame.zoom > 1);
  $("closer").disabled = frame.zoom >= largest;
  $("farther").disabled = $("whole").disabled = frame.zoom === 1;
}

function moveTo(x, y) {
  frame.x = Math.min(Math.max(x, 0), S - frame.width / frame.cellX);
  frame.y = Math.min(Math.max(y, 0), T - frame.height / frame.cellY);
}

// Bring a cell into view after a step by keyboard.
function reveal({ q, k }) {
  const [wide, high] = [frame.width / frame.cellX, frame.height / frame.cellY];
  moveTo(
    Math.min(Math.max(frame.x, k + 1 - wide), k),
    Math.min(Math.max(frame.y, q + 1 - high), q),
  );
}

const columnAt = (px) => frame.x + (px - frame.left) / frame.cellX;
const rowAt = (py) => frame.y + (py - frame.top) / frame.cellY;
const leftOf = (k) => frame.left + (k - frame.x) * frame.cellX;
const topOf = (q) => frame.top + (q - frame.y) * frame.cellY;

function cellAt(event) {
  const box = canvas.getBoundingClientRect();
  const [px, py] = [event.clientX - box.left, event.clientY - box.top];
  const inside =
    px >= frame.left && px < frame.left + frame.width && py >= frame.top && py < frame.top + frame.height;
  if (!inside) return null;
  return { q: Math.min(T - 1, Math.floor(rowAt(py))), k: Math.min(S - 1, Math.floor(columnAt(px))) };
}

function drawMap(map, { q, k }) {
  const ratio = window.devicePixelRatio || 1;
  const { left, top, width, height, cellX, cellY } = frame;
  const rows = [Math.floor(frame.y), Math.min(T, Math.ceil(frame.y + height / cellY))];
  const cols = [Math.floor(frame.x), Math.min(S, Math.ceil(frame.x + width / cellX))];
  paper.setTransform(ratio, 0, 0, ratio, 0, 0);
  paper.clearRect(0, 0, canvas.width, canvas.height);
  paper.save();
  paper.beginPath();
  paper.rect(left, top, width, height);
  paper.clip();
  paper.fillStyle = ink.void;
  paper.fillRect(left, top, width, height);
  paper.imageSmoothingEnabled = Math.min(cellX, cellY) * ratio < 1;
  paper.imageSmoothingQuality = "high";
  const [seenX, seenY] = [width / cellX, height / cellY];
  paper.drawImage(picture, frame.x, frame.y, seenX, seenY, left, top, width, height);
  if (Math.min(cellX, cellY) >= 8) {
    paper.fillStyle = ink.panel;
    for (let i = cols[0] + 1; i < cols[1]; i++) paper.fillRect(leftOf(i) - 0.5, top, 1, height);
    for (let i = rows[0] + 1; i < rows[1]; i++) paper.fillRect(left, topOf(i) - 0.5, width, 1);
  }
  if (Math.min(cellX, cellY) >= VALUE) drawValues(map, rows, cols);
  drawCross(q, k);
  paper.restore();
  drawAxis(queries, rows, cellY, q, false);
  drawAxis(keys, cols, cellX, k, true);
}

function drawValues(map, rows, cols) {
  paper.font = SMALL;
  paper.textAlign = "center";
  paper.textBaseline = "middle";
  for (let q = rows[0]; q < rows[1]; q++) {
    for (let k = cols[0]; k < cols[1]; k++) {
      const weight = map.weight(q, k);
      if (weight === 0) continue;
      const text = weight < 0.005 ? "<.01" : weight >= 0.995 ? "1" : weight.toFixed(2).slice(1);
      paper.fillStyle = colorScale.ink[shade(weight, map.largest[q])];
      paper.fillText(text, leftOf(k + 0.5), topOf(q + 0.5));
    }
  }
}

// The row and the column of the cell that is pointed at, and the cell.
function drawCross(q, k) {
  const { left, top, width, height, cellX, cellY } = frame;
  paper.strokeStyle = paper.fillStyle = ink.accent;
  paper.lineWidth = 1;
  paper.globalAlpha = 0.6;
  // Two lines beside a thin row would hide it.
  if (q !== null && cellY < 6) paper.fillRect(left, topOf(q + 0.5) - 0.5, width, 1);
  else if (q !== null) paper.strokeRect(left - 9, topOf(q), width + 18, cellY);
  if (k !== null && cellX < 6) paper.fillRect(leftOf(k + 0.5) - 0.5, top, 1, height);
  else if (k !== null) paper.strokeRect(leftOf(k), top - 9, cellX, height + 18);
  paper.globalAlpha = 1;
  if (q === null || k === null) return;
  paper.lineWidth = 2.5;
  const [growX, growY] = [Math.max(0, 5 - cellX / 2), Math.max(0, 5 - cellY / 2)];
  paper.strokeRect(leftOf(k) - growX, topOf(q) - growY, cellX + 2 * growX, cellY + 2 * growY);
}

// Tokens where there is room for each, else positions; the chosen one always.
function drawAxis(tokens, [first, end], cell, chosen, isTop) {
  const { left, top, width, height } = frame;
  const all = cell >= LABEL;
  const upright = isTop && (!all || longest(tokens, 999) <= cell - 3);
  const room = (isTop ? top : left) - 8;
  paper.save();
  paper.beginPath();
  if (isTop) paper.rect(left - 30, 0, width + 60, top);
  else paper.rect(0, top - 8, left, height + 16);
  paper.clip();
  paper.textAlign = upright ? "center" : isTop ? "left" : "right";
  paper.textBaseline = upright ? "bottom" : "middle";
  const put = (at, text) => {
    paper.save();
    if (isTop) paper.translate(at, top - (upright ? 4 : 6));
    else paper.translate(left - 6, at);
    if (isTop && !upright) paper.rotate(-Math.PI / 2);
    paper.fillText(text, 0, 0);
    paper.restore();
  };
  const middle = (i) => (isTop ? leftOf(i + 0.5) : topOf(i + 0.5));
  if (all) {
    paper.font = FONT;
    for (let i = first; i < end; i++) {
      paper.fillStyle = i === chosen ? ink.accent : ink.text;
      put(middle(i), upright ? tokens[i] : cut(tokens[i], room));
    }
    paper.restore();
    return;
  }
  // The chosen token, and positions that leave it room.
  let [from, to] = [Infinity, -Infinity];
  if (chosen !== null && chosen >= first && chosen < end) {
    paper.font = FONT;
    paper.fillStyle = ink.accent;
    const text = cut(tokens[chosen], isTop ? 0.4 * width : room);
    const half = isTop ? paper.measureText(text).width / 2 : 6;
    const at = isTop
      ? Math.min(Math.max(middle(chosen), half), left + width - half)
      : Math.min(Math.max(middle(chosen), top), top + height - 4);
    put(at, text);
    [from, to] = [at - half - 12, at + half + 12];
  }
  paper.font = SMALL;
  paper.fillStyle = ink.faint;
  const apart = (isTop ? 44 : 32) / cell;
  const power = 10 ** Math.floor(Math.log10(apart));
  const step = [1, 2, 5, 10].find((n) => n * power >= apart) * power;
  const edge = isTop ? canvas.clientWidth - paper.measureText(T + S).width / 2 : Infinity;
  for (let i = Math.ceil(first / step) * step; i < end; i += step)
    if (middle(i) < from || middle(i) > to) put(Math.min(middle(i), edge), i);
  paper.restore();
}

function drawLegend() {
  const bar = $("bar");
  bar.width = 256;
  bar.height = 1;
  const strip = bar.getContext("2d");
  for (let i = 0; i < 256; i++) {
    strip.fillStyle = colorScale.css[i];
    strip.fillRect(i, 0, 1, 1);
  }
  const { mode, limit } = colorScale;
  const root = mode === "fit" || mode === "root";
  // Round weights that stand apart, from the strongest down.
  let last = 0.88;
  const roomy = [0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.002].filter((weight) => {
    const at = Math.sqrt(weight / limit);
    const fits = at > 0.13 && at < last - 0.1;
    if (fits) last = at;
    return fits;
  });
  const shares = root ? [0, ...roomy.map((weight) => weight / limit), 1] : [0, 0.25, 0.5, 0.75, 1];
  $("ticks").replaceChildren(
    ...shares.map((share) => {
      let text = share === 0 ? "0" : String(Number((share * limit).toPrecision(2)));
      if (share === 1 && limit < 1) text = `≥ ${text}`;
      if (share === 1 && mode === "share") text = "row’s largest";
      const tick = make("span", "", text);
      tick.style.left = `${100 * (root ? Math.sqrt(share) : share)}%`;
      return tick;
    }),
  );
}
