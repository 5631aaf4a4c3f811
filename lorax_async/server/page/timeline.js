// A timeline of a trace in Chrome's trace event format, drawn on a canvas: a lane per connection,
// buffer, slot and thread, a colour per layer. The server's page and the HTML files of
// `lorax-async timeline` use it. Texts of a trace only ever go to fillText and textContent.

export const LEGEND =
  "One colour per layer, blue (first) to orange (last); pale red: a wait; grey: no layer.";
const KEYS = "Zoom: wheel, + and −; move: drag, arrow keys; all: 0.";

const LANE = 18; // pixels: a lane's height,
const ROW = 14; // the title above the lanes of a row,
const TOP = 22; // the axis
const MOST_LANES = 400; // no browser takes a higher canvas
const SAME = 5e-7; // milliseconds: times are whole nanoseconds, rounded
const GREYS = {
  requests: "#6b7a90", files: "#8d99ab", connections: "#a3aab5", layers: "#cfd6e0", compute: "#b9c2cf",
};

// -- layout: no DOM ------------------------------------------------------------------------------

/** Lanes of boxes, in milliseconds, of the spans that touch the given part. */
export function layout(trace, from, until) {
  const events = Array.isArray(trace) ? trace : (trace.traceEvents ?? []);
  const names = new Map();
  for (const { ph, name, pid = null, tid = null, args } of events) {
    if (ph !== "M" || !args) continue;
    const process = String(name).startsWith("process");
    names.set(JSON.stringify([name, pid, process ? null : tid]), Object.values(args)[0]);
  }
  const places = new Map();
  for (const span of spansOf(events)) {
    const { ts, dur, pid = null, tid = null } = span;
    if (!Number.isFinite(ts) || !(dur >= 0)) continue; // of a foreign trace
    if ((ts + dur) / 1e3 < (from ?? -Infinity) || ts / 1e3 > (until ?? Infinity)) continue;
    const key = JSON.stringify([pid, tid]);
    if (!places.has(key)) places.set(key, { pid, tid, spans: [] });
    places.get(key).spans.push(span);
  }
  const of = (what, pid, tid) => names.get(JSON.stringify([what, pid, tid]));
  const order = ({ pid, tid }) => [
    number(of("process_sort_index", pid, null)), String(pid),
    number(of("thread_sort_index", pid, tid)), String(tid),
  ];
  const lanes = [...places.values()]
    .map((place) => ({ ...place, order: order(place) }))
    .sort((a, b) => compare(a.order, b.order))
    .flatMap(({ pid, tid, spans }) => {
      const row = String(of("process_name", pid, null) ?? `process ${pid}`);
      const title = String(of("thread_name", pid, tid) ?? `thread ${tid}`);
      return lanesOf(spans).map((boxes, n) => ({ row, title: n ? `${title} (${n + 1})` : title, boxes }));
    });
  const found = { lanes, start: from, stop: until, first: Infinity, last: -Infinity };
  let [least, most] = [Infinity, -Infinity];
  for (const box of lanes.flatMap((lane) => lane.boxes)) {
    least = Math.min(least, box.start);
    most = Math.max(most, box.stop);
    if (box.layer === null) continue;
    found.first = Math.min(found.first, box.layer);
    found.last = Math.max(found.last, box.layer);
  }
  found.start ??= lanes.length ? least : 0;
  found.stop ??= lanes.length ? most : 0;
  found.dropped = number(trace.otherData?.dropped);
  return found;
}

/** Complete events, and the pairs of asynchronous ones. Those of one `nest` may lie in each other. */
function* spansOf(events) {
  const open = new Map(); // by category and id, which say what belongs together
  for (const event of events) {
    const { ph, ts, pid, cat, id, id2 } = event;
    if (ph === "X") yield { ...event, nest: "" };
    if (ph !== "b" && ph !== "e") continue;
    const nest = JSON.stringify([pid, cat, id ?? id2]);
    if (!open.has(nest)) open.set(nest, []);
    if (ph === "b") open.get(nest).push(event);
    else for (const begin of open.get(nest).splice(-1)) yield { ...begin, dur: ts - begin.ts, nest };
  }
}

/** Boxes in as few lanes as are needed: in a lane they follow each other, or lie in each other. */
function lanesOf(spans) {
  const lanes = [];
  for (const { ts, dur, name = "", args, nest } of spans.sort((a, b) => a.ts - b.ts || b.dur - a.dur)) {
    const [start, stop] = [ts / 1e3, (ts + dur) / 1e3];
    let lane = lanes.find(({ around }) => {
      while (around.length && around.at(-1).stop <= start + SAME) around.pop();
      const outer = around.at(-1);
      return !outer || (outer.nest === nest && stop <= outer.stop + SAME);
    });
    if (!lane) lanes.push((lane = { boxes: [], around: [] }));
    const layer = args?.layer ?? args?.groups?.[0];
    const box = { start, stop, name: String(name).slice(0, 120), depth: lane.around.length, args };
    lane.boxes.push({ ...box, layer: Number.isSafeInteger(layer) ? layer : null, waits: box.name.startsWith("wait") });
    lane.around.push({ stop, nest });
  }
  return lanes.map(({ boxes }) => boxes);
}

function compare(a, b) {
  const at = a.findIndex((value, n) => value !== b[n]);
  return at < 0 ? 0 : a[at] < b[at] ? -1 : 1;
}

const number = (value) => (Number.isFinite(value) ? value : 0);
const fixed = (value, digits = 1) =>
  value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });

/** How much computing overlaps with copies, and whether spans are missing. */
export function summary(drawing) {
  const { lanes, start, stop, dropped } = drawing;
  const boxes = (row) => lanes.flatMap((lane) => (lane.row === row ? lane.boxes : []));
  const last = boxes("copies").reduce((most, box) => Math.max(most, box.stop), -Infinity);
  let [computed, overlapped, end] = [0, 0, -Infinity];
  const layers = boxes("compute").filter((box) => box.layer !== null && !box.waits);
  for (const box of layers.sort((a, b) => a.start - b.start)) {
    const from = Math.max(box.start, start, end);
    const until = Math.min(box.stop, stop);
    if (until <= from) continue;
    computed += until - from;
    overlapped += Math.max(0, Math.min(until, last) - from);
    end = until;
  }
  const more = lanes.length - MOST_LANES;
  const gone =
    (dropped ? `; the oldest ${fixed(dropped, 0)} spans are gone` : "") +
    (more > 0 ? `; ${fixed(more, 0)} more lanes are not drawn` : "");
  const length = `${fixed(stop - start)} ms`;
  if (!computed) return `${length}; no layer was computed${gone}`;
  const share = fixed((100 * overlapped) / computed, 0);
  return (
    `${length}; layers were computed for ${fixed(computed)} ms, of which ${fixed(overlapped)} ms` +
    ` (${share} %) before the last copy had ended${gone}`
  );
}

/** At most `most` round milliseconds between two bounds, in steps of 1, 2 or 5 times 10^n. */
export function marks(start, stop, most = 10) {
  const least = Math.max(stop - start, 1e-6) / most;
  const power = 10 ** Math.floor(Math.log10(least));
  const step = [1, 2, 5, 10, 20].map((digit) => digit * power).find((each) => each > least);
  const found = [];
  const first = Math.ceil(start / step); // so large that first + 1 === first, in a foreign trace
  for (let n = 0; n <= 2 * most; n++) {
    const at = (first + n) * step;
    if (at > stop + 1e-9) break;
    if (at !== found.at(-1)) found.push(at);
  }
  return found;
}

/** A tenth of a microsecond, or what a number of this size can still tell apart. */
const shortestView = ([, most]) => Math.max(1e-4, Math.abs(most) * 2 ** -40);

/** The view [start, stop] scaled around a millisecond, inside of its bounds. */
export function zoomed([start, stop], bounds, factor, at) {
  const shortest = shortestView(bounds);
  const length = Math.max((stop - start) * factor, shortest);
  return inside(at - ((at - start) / (stop - start)) * length, length, bounds);
}

/** The view moved by some milliseconds, inside of its bounds. */
export const moved = ([start, stop], bounds, by) => inside(start + by, stop - start, bounds);

function inside(start, length, [least, most]) {
  if (length >= most - least) return [least, most];
  const from = Math.min(Math.max(start, least), most - length);
  return [from, from + length];
}

function colour(box, row, { first, last }) {
  if (box.waits) return "#f1c9c9";
  if (box.layer === null) return box.name === "connect" ? "#c9b8e8" : (GREYS[row] ?? "#9aa5b4");
  const place = (box.layer - first) / Math.max(1, last - first);
  // Lightness differs too, for those who cannot tell hues apart.
  return `hsl(${360 * (0.62 - 0.57 * place)} 62% ${100 * (0.42 + 0.16 * place)}%)`;
}

/** What the innermost of nested boxes is. */
function details(boxes) {
  const { start, stop, args } = boxes.at(-1);
  const more = Object.entries(args ?? {})
    .filter(([name]) => name !== "layer")
    .map(([name, value]) => `${name} ${typeof value === "object" ? JSON.stringify(value) : value}`);
  const names = boxes.map((box) => box.name).join(" › ");
  return [`${names}: ${fixed(stop - start, 3)} ms from ${fixed(start, 3)}`, ...more].join(", ");
}

// -- the canvas ----------------------------------------------------------------------------------

const shown = new WeakMap(); // what ends the timeline that a place shows now

/** Draw a trace into an element, in place of what is there. Returns its summary. */
export function show(place, trace, { from, until } = {}) {
  shown.get(place)?.abort();
  const ended = new AbortController();
  shown.set(place, ended);
  const drawing = layout(trace, from, until);
  const text = summary(drawing);
  const [bar, canvas, note, legend] = ["div", "canvas", "p", "p"].map((tag) => document.createElement(tag));
  canvas.tabIndex = 0;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `timeline: ${text}`);
  Object.assign(canvas.style, { display: "block", width: "100%", touchAction: "pan-y" });
  Object.assign(note.style, { minHeight: "2.8em", overflowWrap: "anywhere" });
  note.className = "note";
  note.textContent = KEYS;
  legend.textContent = LEGEND;
  place.replaceChildren(bar, canvas, note, legend);
  const view = new View(canvas, drawing, (boxes) => (note.textContent = boxes.length ? details(boxes) : KEYS));
  for (const [name, text, act] of view.buttons()) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = text;
    button.setAttribute("aria-label", name);
    button.onclick = act;
    bar.append(button);
  }
  view.listen(ended.signal);
  return text;
}

class View {
  constructor(canvas, drawing, tell) {
    Object.assign(this, { canvas, drawing, tell, pointers: new Map(), frame: 0 });
    const least = Math.max(1e-3, shortestView([0, drawing.stop]));
    this.bounds = [drawing.start, Math.max(drawing.stop, drawing.start + least)];
    this.part = this.bounds;
    let [row, y] = [null, TOP];
    this.lanes = drawing.lanes.slice(0, MOST_LANES).map((lane) => {
      const first = lane.row !== row;
      row = lane.row;
      const top = first ? (y += ROW) : y;
      y = top + LANE;
      return { ...lane, top, first };
    });
    this.height = y + 4;
    canvas.style.height = `${this.height}px`;
  }

  get length() {
    return this.part[1] - this.part[0];
  }

  buttons() {
    const middle = () => (this.part[0] + this.part[1]) / 2;
    return [
      ["zoom in", "+", () => this.zoom(0.5, middle())],
      ["zoom out", "−", () => this.zoom(2, middle())],
      ["show all", "all", () => this.go(this.bounds)],
    ];
  }

  listen(signal) {
    const { canvas } = this;
    const on = (type, act) => canvas.addEventListener(type, act.bind(this), { signal, passive: false });
    on("wheel", this.wheel);
    on("keydown", this.key);
    on("pointerdown", this.press);
    on("pointermove", this.move);
    for (const type of ["pointerup", "pointercancel"]) on(type, (event) => this.pointers.delete(event.pointerId));
    on("pointerleave", (event) => event.pointerType === "mouse" && this.tell([]));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.redraw(), { signal });
    const observer = new ResizeObserver(() => this.redraw());
    observer.observe(canvas);
    signal.addEventListener("abort", () => observer.disconnect());
  }

  go(part) {
    this.part = part[1] - part[0] >= this.bounds[1] - this.bounds[0] ? this.bounds : part;
    this.redraw();
  }

  zoom(factor, at) {
    this.go(zoomed(this.part, this.bounds, factor, at));
  }

  wheel(event) {
    if (event.deltaY > 0 && this.part === this.bounds) return; // let the page scroll
    event.preventDefault();
    const sideways = event.shiftKey ? event.deltaY : event.deltaX;
    if (Math.abs(sideways) >= Math.abs(event.deltaY)) this.go(moved(this.part, this.bounds, this.ms(sideways)));
    else this.zoom(Math.exp(event.deltaY / 400), this.at(event.offsetX));
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const step = this.length / 5;
    const [zoomIn, zoomOut, all] = this.buttons().map(([, , act]) => act);
    const act = {
      "+": zoomIn, "=": zoomIn, "-": zoomOut, 0: all, Home: all,
      ArrowLeft: () => this.go(moved(this.part, this.bounds, -step)),
      ArrowRight: () => this.go(moved(this.part, this.bounds, step)),
    }[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  }

  press(event) {
    this.pointers.set(event.pointerId, event.offsetX);
    this.canvas.setPointerCapture(event.pointerId);
    this.tell(this.hit(event.offsetX, event.offsetY));
  }

  move(event) {
    const { pointers } = this;
    const before = pointers.get(event.pointerId);
    if (before === undefined) return this.tell(this.hit(event.offsetX, event.offsetY));
    pointers.set(event.pointerId, event.offsetX);
    if (pointers.size === 1) return this.go(moved(this.part, this.bounds, this.ms(before - event.offsetX)));
    const other = [...pointers].find(([id]) => id !== event.pointerId)[1];
    const [old, now] = [before - other, event.offsetX - other].map((x) => Math.max(Math.abs(x), 8));
    this.zoom(old / now, this.at(other));
  }

  get left() {
    return this.canvas.clientWidth < 600 ? 84 : 132;
  }

  get wide() {
    return Math.max(1, this.canvas.clientWidth - this.left - 8);
  }

  ms(pixels) {
    return (pixels / this.wide) * this.length;
  }

  at(x) {
    return this.part[0] + this.ms(x - this.left);
  }

  x(ms) {
    const share = (ms - this.part[0]) / this.length;
    return this.left + Math.min(Math.max(share, 0), 1) * this.wide;
  }

  /** The boxes at a point, or within two pixels of it, from the outermost to the innermost. */
  hit(x, y) {
    const lane = this.lanes.find(({ top }) => y >= top && y < top + LANE);
    const at = this.at(x);
    const slack = this.ms(2);
    const touched = lane?.boxes.filter((box) => box.start - slack <= at && at <= box.stop + slack) ?? [];
    return [...new Map(touched.map((box) => [box.depth, box])).values()].sort((a, b) => a.depth - b.depth);
  }

  redraw() {
    if (!this.frame) this.frame = requestAnimationFrame(() => { this.frame = 0; this.draw(); });
  }

  draw() {
    const { canvas, height } = this;
    const scale = window.devicePixelRatio || 1;
    canvas.width = canvas.clientWidth * scale;
    canvas.height = height * scale;
    this.ink = getComputedStyle(canvas).color;
    const pen = canvas.getContext("2d");
    pen.scale(scale, scale);
    pen.font = "10px system-ui, sans-serif";
    this.drawAxis(pen);
    for (const lane of this.lanes) this.drawLane(pen, lane);
  }

  drawAxis(pen) {
    pen.textAlign = "center";
    for (const mark of marks(...this.part, Math.min(10, Math.ceil(this.wide / 90)))) {
      const x = this.x(mark);
      pen.globalAlpha = 0.2;
      pen.fillStyle = this.ink;
      pen.fillRect(x, 16, 1, this.height - 20);
      const label = `${Number(mark.toPrecision(9))} ms`;
      const most = this.canvas.clientWidth - pen.measureText(label).width / 2;
      this.write(pen, label, Math.min(x, most), 12, 0.7);
    }
    pen.textAlign = "left";
  }

  drawLane(pen, lane) {
    const { top } = lane;
    pen.font = "bold 10px system-ui, sans-serif";
    if (lane.first) this.write(pen, lane.row, 4, top - 3, 1, this.left);
    pen.font = "10px system-ui, sans-serif";
    this.write(pen, lane.title, 10, top + 12, 1, this.left - 14);
    pen.globalAlpha = 0.06;
    pen.fillRect(this.left, top, this.wide, LANE - 2);
    pen.globalAlpha = 1;
    const last = [-1, -1, -1]; // by depth: the pixel that a narrow box has already
    for (const box of lane.boxes) {
      if (box.stop < this.part[0] || box.start > this.part[1]) continue;
      const depth = Math.min(box.depth, 2);
      const x = this.x(box.start);
      const width = this.x(box.stop) - x;
      if (width < 1 && last[depth] === Math.floor(x)) continue;
      last[depth] = width < 1 ? Math.floor(x) : -1;
      pen.fillStyle = colour(box, lane.row, this.drawing);
      // A gap of half a pixel keeps neighbours apart.
      pen.fillRect(x, top + 2.5 * depth, Math.max(1.2, width - 0.5), LANE - 2 - 5 * depth);
      this.drawName(pen, box, x, width, top);
    }
  }

  drawName(pen, box, x, width, top) {
    const ofLayer = box.layer !== null && !box.waits;
    const texts = ofLayer ? [box.name, String(box.layer)] : [box.name];
    const text = width > 8 && texts.find((each) => pen.measureText(each).width + 6 <= width);
    if (text) this.write(pen, text, x + 3, top + 12, 1, width, ofLayer ? "#fff" : "#1d2733");
  }

  write(pen, text, x, y, alpha = 1, width = Infinity, ink = this.ink) {
    pen.globalAlpha = alpha;
    pen.fillStyle = ink;
    while (text.length > 1 && pen.measureText(text).width > width) text = text.replace(/…?$/, "").slice(0, -1) + "…";
    pen.fillText(text, x, y);
    pen.globalAlpha = 1;
  }
}
