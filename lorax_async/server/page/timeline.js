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

// -- layout: no DOM ------------------------------------------------------------------------------

/** Lanes of boxes, in milliseconds, of the spans that touch the given part. */
export function layout(trace, from, until) {
  const events = trace.traceEvents ?? trace;
  const rows = new Map(); // by process; in each its lanes by thread: as the trace mentions them
  const find = (map, key, made) => map.get(key) ?? map.set(key, made).get(key);
  const rowOf = ({ pid = null }, key = JSON.stringify(pid)) =>
    find(rows, key, { title: `process ${key}`, threads: new Map() });
  const threadOf = ({ tid = null, ...rest }, key = JSON.stringify(tid)) =>
    find(rowOf(rest).threads, key, { title: `thread ${key}`, spans: [] });
  for (const event of events) {
    if (event.ph !== "M" || !event.args?.name) continue;
    if (event.name === "process_name") rowOf(event).title = String(event.args.name);
    if (event.name === "thread_name") threadOf(event).title = String(event.args.name);
  }
  for (const span of spansOf(events)) {
    const [start, stop] = [span.ts / 1e3, (span.ts + span.dur) / 1e3];
    if (!Number.isFinite(span.ts) || !(span.dur >= 0)) continue; // of a foreign trace
    if (stop >= (from ?? -Infinity) && start <= (until ?? Infinity)) threadOf(span).spans.push(span);
  }
  const lanes = [...rows.values()].flatMap(({ title: row, threads }) =>
    [...threads.values()].flatMap(({ title, spans }) =>
      lanesOf(spans).map((boxes, n) => ({ row, title: n ? `${title} (${n + 1})` : title, boxes })),
    ),
  );
  const boxes = lanes.flatMap((lane) => lane.boxes);
  const [start, stop] = boxes.length ? extent(boxes.flatMap((box) => [box.start, box.stop])) : [0, 0];
  const [first, last] = extent(boxes.filter((box) => box.layer !== null).map((box) => box.layer));
  const dropped = Number.isFinite(trace.otherData?.dropped) ? trace.otherData.dropped : 0;
  return { lanes, start: from ?? start, stop: until ?? stop, first, last, dropped };
}

const extent = (values) =>
  values.reduce(([least, most], value) => [Math.min(least, value), Math.max(most, value)], [Infinity, -Infinity]);

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
  const first = Math.ceil(start / step);
  const count = Math.min(Math.floor((stop + 1e-9) / step) - first + 1, 2 * most);
  return Array.from({ length: Math.max(0, count) }, (_, n) => (first + n) * step);
}

/** A tenth of a microsecond, or what a number of this size can still tell apart. */
const shortestView = ([, most]) => Math.max(1e-4, Math.abs(most) * 2 ** -40);

/** The view [start, stop] scaled around a millisecond, inside of its bounds. */
export function zoomed([start, stop], bounds, factor, at) {
  const length = Math.max((stop - start) * factor, shortestView(bounds));
  return inside(at - ((at - start) / (stop - start)) * length, length, bounds);
}

/** The view moved by some milliseconds, inside of its bounds. */
export const moved = ([start, stop], bounds, by) => inside(start + by, stop - start, bounds);

function inside(start, length, [least, most]) {
  if (length >= most - least) return [least, most];
  const from = Math.min(Math.max(start, least), most - length);
  return [from, from + length];
}

function colour(box, { first, last }) {
  if (box.waits) return "#f1c9c9";
  if (box.layer === null) return "#a3aab5";
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

let scheme; // light or dark; one timeline is shown at a time

/** Draw a trace into an element, in place of what is there. Returns its summary. */
export function show(place, trace, { from, until } = {}) {
  const drawing = layout(trace, from, until);
  const text = summary(drawing);
  const [bar, canvas, note, legend] = ["div", "canvas", "p", "p"].map((tag) => document.createElement(tag));
  Object.assign(canvas, { tabIndex: 0, role: "img", ariaLabel: `timeline: ${text}` });
  Object.assign(canvas.style, { display: "block", width: "100%", touchAction: "pan-y" });
  Object.assign(note.style, { minHeight: "2.8em", overflowWrap: "anywhere" });
  note.className = "note";
  note.textContent = KEYS;
  legend.textContent = LEGEND;
  place.replaceChildren(bar, canvas, note, legend);
  const view = new View(canvas, drawing, (boxes) => (note.textContent = boxes.length ? details(boxes) : KEYS));
  for (const [ariaLabel, textContent, onclick] of view.buttons()) {
    bar.append(Object.assign(document.createElement("button"), { ariaLabel, textContent, onclick }));
  }
  view.listen();
  return text;
}

class View {
  constructor(canvas, drawing, tell) {
    Object.assign(this, { canvas, drawing, tell, dragged: 0, frame: 0 });
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

  listen() {
    this.canvas.onwheel = (event) => this.wheel(event);
    this.canvas.onkeydown = (event) => this.key(event);
    this.canvas.onpointerdown = (event) => this.press(event);
    this.canvas.onpointermove = (event) => this.move(event);
    this.canvas.onpointerleave = (event) => event.pointerType === "mouse" && this.tell([]);
    scheme ??= matchMedia("(prefers-color-scheme: dark)");
    scheme.onchange = () => this.redraw();
    new ResizeObserver(() => this.redraw()).observe(this.canvas);
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
    this.zoom(Math.exp(event.deltaY / 400), this.at(event.offsetX));
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
    this.dragged = event.offsetX;
    this.canvas.setPointerCapture(event.pointerId);
    this.tell(this.hit(event.offsetX, event.offsetY));
  }

  move(event) {
    if (!event.isPrimary) return;
    if (!event.buttons) return this.tell(this.hit(event.offsetX, event.offsetY));
    this.go(moved(this.part, this.bounds, this.ms(this.dragged - event.offsetX)));
    this.dragged = event.offsetX;
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
    return [...new Map(touched.map((box) => [box.depth, box])).values()];
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
    for (const box of lane.boxes) {
      if (box.stop < this.part[0] || box.start > this.part[1]) continue;
      const depth = Math.min(box.depth, 2);
      const x = this.x(box.start);
      const width = this.x(box.stop) - x;
      pen.fillStyle = colour(box, this.drawing);
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
