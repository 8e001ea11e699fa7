// The heads: thumbnails, their order, and where the chosen one stands among all.

const thumbnails = [];
let order = Array.from({ length: L * N }, (_, head) => head);
let columns = N;

async function buildHeads() {
  const [height, width] = page.thumbnail_size;
  const codes = new Uint8Array(await inflate(page.thumbnails));
  for (let head = 0; head < L * N; head++) {
    const option = make("div", "head");
    option.id = `head-${head}`;
    option.setAttribute("role", "option");
    const canvas = make("canvas");
    canvas.width = width;
    canvas.height = height;
    const caption = make("span", "caption");
    caption.append(make("span", "", `L${Math.floor(head / N)} H${head % N}`), make("b"));
    option.append(canvas, caption);
    thumbnails.push({ option, canvas, caption, codes: codes.subarray(head * width * height) });
  }
  for (const [i, statistic] of statistics.entries()) {
    $("order").append(new Option(statistic.title, i));
    $("statistics").append(statisticRow(statistic, i));
  }
  $("order").prepend(new Option("layer, head", "", true, true));
  paintThumbnails();
  arrangeHeads();
}

function paintThumbnails() {
  for (const { canvas, codes } of thumbnails) {
    const image = new ImageData(canvas.width, canvas.height);
    for (let i = 0; i < canvas.width * canvas.height; i++) {
      if (codes[i] === 0) continue;
      image.data.set(colorScale.rgb.subarray(3 * codes[i], 3 * codes[i] + 3), 4 * i);
      image.data[4 * i + 3] = 255;
    }
    canvas.getContext("2d").putImageData(image, 0, 0);
  }
}

function arrangeHeads() {
  const by = $("order").value;
  const list = $("heads");
  const statistic = by === "" ? null : statistics[by];
  const rising = $("turn").dataset.rising === "yes";
  order = Array.from({ length: L * N }, (_, head) => head);
  if (statistic) {
    // Heads without a value come last either way.
    order.sort((a, b) => {
      const [x, y] = [statistic.values[a], statistic.values[b]];
      if (x === null || y === null) return (x === null) - (y === null) || a - b;
      return (rising ? x - y : y - x) || a - b;
    });
  }
  list.classList.toggle("sorted", statistic !== null);
  $("turn").hidden = statistic === null;
  $("turn").textContent = rising ? "↑" : "↓";
  $("turn").title = rising ? "Least first" : "Largest first";
  $("turn").setAttribute("aria-label", $("turn").title);
  list.replaceChildren();
  if (statistic) {
    list.style.gridTemplateColumns = "";
  } else {
    list.style.gridTemplateColumns = `max-content repeat(${N}, minmax(14px, 84px))`;
    list.append(heading(""));
    for (let n = 0; n < N; n++) list.append(heading(n));
  }
  for (const [place, head] of order.entries()) {
    const { option, caption } = thumbnails[head];
    const said = statistic ? `${short(statistic.values[head])} ${statistic.unit}`.trim() : "";
    if (!statistic && place % N === 0) list.append(heading(place / N));
    caption.lastChild.textContent = statistic ? short(statistic.values[head]) : "";
    option.setAttribute(
      "aria-label",
      headName(head) + (statistic ? `, ${statistic.title} ${said}` : ""),
    );
    option.title = option.getAttribute("aria-label");
    list.append(option);
  }
  for (const [i, row] of [...$("statistics").children].entries())
    row.setAttribute("aria-pressed", String(i) === by);
}

function heading(text) {
  const number = make("span", "number", text);
  number.setAttribute("aria-hidden", "true");
  return number;
}

// How many heads stand side by side: up and down move by it.
function headColumns() {
  if (!$("heads").classList.contains("sorted")) return N;
  const top = thumbnails[order[0]].option.offsetTop;
  const next = order.findIndex((head) => thumbnails[head].option.offsetTop > top);
  return next === -1 ? order.length : next;
}

function statisticRow(statistic, i) {
  const row = make("button", "statistic");
  row.type = "button";
  row.title = `${statistic.about} Click to sort by it.`.trim();
  const value = make("span", "number-value");
  value.append(make("span"), make("span", "unit"));
  row.append(make("span", "name", statistic.title), value);
  // One tick a head, from the least value to the largest.
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 100 14");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  const known = statistic.values.filter((x) => x !== null);
  const [least, most] = [Math.min(...known), Math.max(...known)];
  statistic.place = (x) => (most > least ? (100 * (x - least)) / (most - least) : 50);
  for (const [name, path] of [
    ["all", known.map((x) => `M${statistic.place(x).toFixed(2)} 3V11`).join("")],
    ["one", ""],
  ]) {
    const line = document.createElementNS("http://www.w3.org/2000/svg", "path");
    line.setAttribute("class", name);
    line.setAttribute("d", path);
    svg.append(line);
  }
  row.append(svg);
  row.addEventListener("click", () => {
    $("order").value = $("order").value === String(i) ? "" : i;
    arrangeHeads();
  });
  return row;
}

// Mark the chosen head; only it can be reached by Tab.
function markHead(chosen) {
  for (const [head, { option }] of thumbnails.entries()) {
    option.setAttribute("aria-selected", head === chosen);
    option.tabIndex = head === chosen ? 0 : -1;
  }
  const { option } = thumbnails[chosen];
  const list = $("heads");
  if (option.offsetTop < list.scrollTop) list.scrollTop = option.offsetTop - 8;
  const below = option.offsetTop + option.offsetHeight - list.clientHeight;
  if (below > list.scrollTop) list.scrollTop = below + 8;
  for (const [i, row] of [...$("statistics").children].entries()) {
    const { values, unit, place } = statistics[i];
    const x = values[chosen];
    row.querySelector(".number-value").firstChild.textContent = short(x);
    row.querySelector(".unit").textContent = unit ? ` ${unit}` : "";
    row.querySelector(".one").setAttribute("d", x === null ? "" : `M${place(x).toFixed(2)} 0V14`);
  }
}
