// The last cold requests: the one that is chosen, and its timeline.

import { ask } from "./calls.js";
import { at, milliseconds } from "./elements.js";
import { show as showTimeline } from "./timeline.js";

const NONE_YET = at("cold").textContent;
let requests = []; // the last one first
let operator = false; // whose timelines have other names in them
let drawing = false;
let drawn = ""; // the request that is shown, as text
let failed = false; // to draw it: the next event, or another choice, tries again
let trace = ""; // as it came

export function showCold(cold, isOperator) {
  requests = cold;
  operator = isOperator;
  const chosen = at("which").value;
  const options = requests.map((each) => new Option(titleOf(each), idOf(each)));
  at("which").replaceChildren(new Option("the last one", ""), ...options);
  at("which").value = options.some((option) => option.value === chosen) ? chosen : "";
  at("choose").hidden = requests.length < 2;
  draw();
}

const idOf = (request) => `${request.number} ${request.ended}`; // a new server counts anew
const timeOf = (request) => new Date(request.ended * 1000).toLocaleTimeString();
const endOf = (request) => `${request.outcome} after ${milliseconds(request.seconds * 1000)}`;
const titleOf = (request) => `${request.number}: ${request.name}, ${timeOf(request)}, ${endOf(request)}`;
const chosen = () => requests.find((each) => idOf(each) === at("which").value) ?? requests[0];

async function draw() {
  if (drawing) return; // one at a time; then what is chosen by then
  if (failed) drawn = "";
  drawing = true;
  for (let wanted; (wanted = JSON.stringify([operator, chosen()])) !== drawn; ) {
    drawn = wanted;
    await drawRequest(chosen());
  }
  drawing = false;
}

async function drawRequest(request) {
  failed = false;
  at("timeline").hidden = at("save").hidden = !request;
  if (!request) {
    at("cold").textContent = NONE_YET;
    return;
  }
  try {
    const response = await ask(`page/trace.json?number=${request.number}`);
    trace = await response.text();
    const part = { from: 0, until: request.seconds * 1000 };
    const rest = showTimeline(at("timeline"), JSON.parse(trace), part).replace(/^[^;]*; /, "");
    at("cold").textContent = `${request.name}, ${timeOf(request)}: ${endOf(request)}; ${rest}.`;
  } catch (error) {
    failed = at("timeline").hidden = at("save").hidden = true;
    at("cold").textContent = `${request.name}, ${timeOf(request)}: no timeline: ${error.message}`;
  }
}

at("which").onchange = draw;
at("save").onclick = () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([trace], { type: "application/json" }));
  link.download = "cold-request.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000); // some browsers read it later
};
