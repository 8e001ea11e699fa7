"use strict";
// What the file holds: facts, maps that are unpacked when they are asked for, colours.

const page = JSON.parse(document.getElementById("page").textContent);
const { L, N, T, S, queries, statistics } = page;
const same = page.keys === null;
const keys = page.keys ?? queries;
const $ = (id) => document.getElementById(id);

const make = (tag, className, text) => {
  const element = document.createElement(tag);
  if (className) element.className = className;
  // Tokens and names only ever become text, never markup.
  if (text !== undefined) element.textContent = text;
  return element;
};

function bytes(base64) {
  const raw = atob(base64);
  const out = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i);
  return out;
}

function inflate(base64) {
  const stream = new Blob([bytes(base64)]).stream();
  return new Response(stream.pipeThrough(new DecompressionStream("deflate-raw"))).arrayBuffer();
}

// A weight is its row's largest times a power of its code.
const top = page.levels;
const Codes = top > 255 ? Uint16Array : Uint8Array;
const POWERS = Float64Array.from({ length: top + 1 }, (_, code) => (code / top) ** page.power);

async function unpack(head) {
  const buffer = await inflate($(`map-${head}`).textContent);
  const map = {
    largest: new Float32Array(buffer, 0, T),
    codes: new Codes(buffer, 4 * T),
  };
  map.weight = (q, k) => map.largest[q] * POWERS[map.codes[q * S + k]];
  map.row = (q) => Float64Array.from({ length: S }, (_, k) => map.weight(q, k));
  map.column = (k) => Float64Array.from({ length: T }, (_, q) => map.weight(q, k));
  // Half a step to the next larger byte; the largest weight of a row is stored as it is.
  map.error = (q, k) => {
    const code = map.codes[q * S + k];
    if (code === 0) return 0;
    if (code === top) {
      const tops = map.codes.subarray(q * S, (q + 1) * S).reduce((n, c) => n + (c === top), 0);
      return tops === 1 ? 0 : map.largest[q] * (1 - (1 - 0.5 / top) ** page.power);
    }
    return map.largest[q] * (((code + 0.5) / top) ** page.power - POWERS[code]);
  };
  return map;
}

// The maps used last, the newest at the end.
const HELD = 12;
const held = new Map();

function load(head) {
  const promise = held.get(head) ?? unpack(head);
  held.delete(head);
  held.set(head, promise);
  if (held.size > HELD) held.delete(held.keys().next().value);
  return promise;
}

function largestAt(weights) {
  let best = 0;
  for (let i = 1; i < weights.length; i++) if (weights[i] > weights[best]) best = i;
  return best;
}

const headName = (head) => `Layer ${Math.floor(head / N)}, head ${head % N}`;

// Three significant digits, without exponents where people read none.
function short(x) {
  if (x === null) return "–";
  if (x === 0) return "0";
  x = Number(x.toPrecision(3));
  const size = Math.abs(x);
  if (size < 1e-4 || size >= 1e5) return x.toExponential(1).replace("-", "−");
  return x.toFixed(Math.max(0, Math.min(6, 2 - Math.floor(Math.log10(size))))).replace("-", "−");
}

// A weight with the digits that are known, four at most.
const UNSEEN = 5e-5;
function exact(weight, error) {
  if (weight === 0) return "0";
  if (weight < UNSEEN) return weight.toExponential(1).replace("-", "−");
  const digits = error < UNSEEN ? 4 : Math.max(2, Math.ceil(-Math.log10(error)));
  return weight.toFixed(Math.min(4, digits));
}
const column3 = (weight) => (weight < 5e-4 ? "<0.001" : weight.toFixed(3));

// Colours.

const ramps = page.ramps.map(bytes);
const scheme = window.matchMedia("(prefers-color-scheme: dark)");
const isDark = () =>
  (document.documentElement.dataset.scheme ?? (scheme.matches ? "dark" : "light")) === "dark";

// `limit` is the weight that gets the last colour.
const colorScale = { mode: "fit", limit: 1, rgb: null, css: [], ink: [] };

function chooseColors() {
  colorScale.rgb = ramps[Number(isDark())];
  for (let i = 0; i < 256; i++) {
    const rgb = colorScale.rgb.subarray(3 * i, 3 * i + 3);
    colorScale.css[i] = `rgb(${rgb.join(" ")})`;
    const [r, g, b] = [...rgb].map((c) =>
      c <= 10 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4,
    );
    // Black or white, whichever has more contrast: at least 4.5 either way.
    colorScale.ink[i] = 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000" : "#fff";
  }
}

// Fit the colours to a head: half its rows have a larger weight. Faint heads stay faint.
const LIMITS = [0.05, 0.1, 0.2, 0.5, 1];
function fitColors(map) {
  const tops = map.largest.filter((weight) => weight > 0).sort();
  const middle = tops[tops.length >> 1] ?? 1;
  const fitted = LIMITS.find((limit) => limit >= middle) ?? 1;
  colorScale.limit = colorScale.mode === "fit" ? fitted : 1;
}

// From a weight and its row's largest to an index of the table.
function shade(weight, largest) {
  const { mode, limit } = colorScale;
  const share = weight / (mode === "share" ? largest : limit);
  const bright = mode === "fit" || mode === "root" ? Math.sqrt(share) : share;
  return Math.min(255, Math.round(255 * bright));
}
