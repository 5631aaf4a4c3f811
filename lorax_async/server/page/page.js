import { ask, eventsOf } from "./events.js";
import { show as showTimeline } from "./timeline.js";

const RETRY = 2000; // milliseconds until a lost server is asked again
const at = (id) => document.getElementById(id);
const NONE_YET = at("cold").textContent;
const rows = new Map();
let token = "";
let base = "";
let watching = null;

const headers = () => (token ? { Authorization: `Bearer ${token}` } : {});

// -- events of the server -----------------------------------------------------------------------

async function watch() {
  watching?.abort();
  const mine = (watching = new AbortController());
  while (!mine.signal.aborted) {
    try {
      const response = await ask("page/events", { headers: headers(), signal: mine.signal });
      at("link").textContent = "live";
      for await (const changes of eventsOf(response)) {
        if (changes.error) throw new Error(changes.error.message);
        show(changes);
      }
      at("link").textContent = "the server has ended this; asking again";
    } catch (error) {
      if (mine.signal.aborted) return;
      at("link").textContent = `not connected: ${error.message}`;
      // Watch without the token then; the browser itself refuses one with odd characters.
      if (error.status === 401 || error.status === 403 || /[^!-~]/.test(token)) token = "";
    }
    await new Promise((done) => setTimeout(done, RETRY));
  }
}

function show(changes) {
  const known = rows.size;
  let gone = changes.gone ?? [];
  if (changes.base !== undefined) {
    // It has all rows; those that are known keep their place and the focus.
    gone = [...rows.keys()].filter((id) => !Object.hasOwn(changes.rows, id));
    base = changes.base;
    at("base").textContent = base;
    if (!at("model").value) at("model").value = base;
    if (changes.operator) at("link").textContent = "live, all adapters";
  }
  for (const id of gone) {
    rows.get(id)?.remove();
    rows.delete(id);
  }
  for (const [id, row] of Object.entries(changes.rows ?? {})) showRow(id, row);
  if (changes.base !== undefined || gone.length || rows.size !== known) {
    at("none").hidden = rows.size > 0;
    const names = [base, ...[...rows.keys()].filter((id) => !id.startsWith("\0"))];
    at("models").replaceChildren(...names.map((name) => new Option(name, name)));
  }
  if (changes.more !== undefined) {
    at("more").textContent = changes.more ? `and ${changes.more} more with names, which can be asked, too` : "";
  }
  if (changes.cold !== undefined) showCold(changes.cold);
}

function showRow(id, row) {
  let item = rows.get(id);
  if (!item) {
    item = document.createElement("li");
    rows.set(id, item);
    item.append(row.named ? chooser(row.name) : document.createElement("div"));
    at("adapters").append(item);
  }
  const filling = row.state === "filling" && row.layers;
  item.firstElementChild.replaceChildren(
    text("name", row.name),
    text(`tier ${row.tier}`, row.tier === "source" ? "not loaded" : row.tier),
    text("more", details(row)),
    ...(filling ? [bar(row.layers)] : []),
  );
}

function chooser(name) {
  const button = document.createElement("button");
  button.type = "button";
  button.onclick = () => {
    at("model").value = name;
    at("prompt").focus();
  };
  return button;
}

function details(row) {
  const parts = [];
  if (row.state) parts.push(row.state);
  if (row.state === "filling" && row.layers) parts.push(`${row.layers[0]} of ${row.layers[1]} layers`);
  if (row.bytes) parts.push(size(row.bytes));
  if (row.leases) parts.push(row.leases === 1 ? "in use" : `in use by ${row.leases}`);
  if (row.error) parts.push(row.error);
  return parts.join(", ");
}

function bar([done, all]) {
  const found = document.createElement("progress");
  found.max = all;
  found.value = done;
  found.setAttribute("aria-label", "layers on the device");
  return found;
}

function text(kind, content) {
  const found = document.createElement("span");
  found.className = kind;
  found.textContent = content;
  return found;
}

function size(bytes) {
  const units = ["B", "KiB", "MiB", "GiB"];
  let unit = 0;
  for (; bytes >= 1024 && unit < 3; unit++) bytes /= 1024;
  return `${bytes.toFixed(unit ? 1 : 0)} ${units[unit]}`;
}

// -- the last cold request -----------------------------------------------------------------------

let newest = null;
let drawing = false;
let trace = ""; // what is drawn, as it came

async function showCold(cold) {
  newest = cold;
  if (drawing) return; // one at a time; then the newest
  drawing = true;
  for (let drawn; drawn !== newest; ) await draw((drawn = newest));
  drawing = false;
}

async function draw(cold) {
  at("timeline").hidden = at("save").hidden = !cold;
  if (!cold) {
    at("cold").textContent = NONE_YET;
    return;
  }
  const when = new Date(cold.ended * 1000).toLocaleTimeString();
  const took = cold.seconds * 1000;
  try {
    const response = await ask("page/trace.json", { headers: headers() });
    trace = await response.text();
    const summary = showTimeline(at("timeline"), JSON.parse(trace), { from: 0, until: took });
    const rest = summary.replace(/^[^;]*; /, "");
    at("cold").textContent = `${cold.name}, ${when}: ${cold.outcome} after ${milliseconds(took)}; ${rest}.`;
  } catch (error) {
    at("timeline").hidden = at("save").hidden = true;
    trace = "";
    at("cold").textContent = `${cold.name}, ${when}: no timeline: ${error.message}`;
  }
}

at("save").onclick = () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([trace], { type: "application/json" }));
  link.download = "cold-request.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000); // some browsers read it later
};

// -- a prompt ------------------------------------------------------------------------------------

let asking = null;

const milliseconds = (value) => (value < 1000 ? `${value.toFixed(0)} ms` : `${(value / 1000).toFixed(2)} s`);

async function send() {
  asking?.abort();
  const mine = (asking = new AbortController());
  at("error").textContent = at("answer").textContent = "";
  at("times").textContent = "waiting for the first token";
  at("answer").setAttribute("aria-busy", "true"); // read aloud once it is complete
  at("stop").disabled = false;
  const began = performance.now();
  let first = null;
  let tokens = 0;
  try {
    const response = await ask("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json", ...headers() },
      body: JSON.stringify({
        model: at("model").value.trim(),
        messages: [{ role: "user", content: at("prompt").value }],
        stream: true,
        stream_options: { include_usage: true },
        max_tokens: 256,
      }),
      signal: mine.signal,
    });
    for await (const chunk of eventsOf(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      const content = chunk.choices[0]?.delta?.content;
      if (content) first ??= performance.now();
      if (content) at("answer").append(content);
      tokens = chunk.usage?.completion_tokens ?? tokens;
    }
    at("times").textContent = timesOf(began, first, tokens);
  } catch (error) {
    if (mine !== asking) return; // another one was sent
    const stopped = mine.signal.aborted;
    at("times").textContent = stopped ? "stopped" : "";
    at("error").textContent = stopped ? "" : error.message;
  }
  if (mine !== asking) return;
  at("answer").setAttribute("aria-busy", "false");
  if (document.activeElement === at("stop")) at("send").focus(); // a disabled button loses it
  at("stop").disabled = true;
}

function timesOf(began, first, tokens) {
  if (first === null) return "ended without a word";
  const seconds = (performance.now() - first) / 1000;
  const rate = tokens > 1 && seconds > 0 ? `, ${((tokens - 1) / seconds).toFixed(1)} tokens/s` : "";
  return `first token after ${milliseconds(first - began)}; ${tokens} tokens${rate}`;
}

at("try").onsubmit = (event) => {
  event.preventDefault();
  send();
};
at("stop").onclick = () => asking?.abort();
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") asking?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && at("try").contains(event.target)) {
    event.preventDefault();
    at("try").requestSubmit();
  }
});
at("operator").onsubmit = (event) => {
  event.preventDefault();
  token = at("token").value.trim();
  watch();
};

watch();
