// The last cold requests: the one that is chosen, and its timeline.

import { ask } from "./calls.js";
import { at, milliseconds } from "./elements.js";
import { show as showTimeline } from "./timeline.js";

const NONE_YET = at("cold").textContent;
let requests = []; // the last one first
let operator = false; // whose timelines have other names in them
let drawn = ""; // the request that is shown, as text

export function showCold(cold, isOperator) {
  [requests, operator] = [cold, isOperator];
  const chosen = at("which").value;
  const options = requests.map((each) => new Option(`${each.number}: ${titleOf(each)}`, idOf(each)));
  at("which").replaceChildren(new Option("the last one", ""), ...options);
  at("which").value = options.some((option) => option.value === chosen) ? chosen : "";
  at("choose").hidden = requests.length < 2;
  draw();
}

const idOf = (request) => `${request.number} ${request.ended}`; // a new server counts anew

function titleOf({ name, ended, outcome, seconds }) {
  const time = new Date(ended * 1000).toLocaleTimeString();
  return `${name}, ${time}: ${outcome} after ${milliseconds(seconds * 1000)}`;
}

async function draw() {
  const request = requests.find((each) => idOf(each) === at("which").value) ?? requests[0];
  const wanted = JSON.stringify([operator, request]);
  if (wanted === drawn) return;
  drawn = wanted;
  at("timeline").hidden = at("save").hidden = true;
  at("cold").textContent = request ? titleOf(request) : NONE_YET;
  if (!request) return;
  try {
    const response = await ask(`page/trace.json?number=${request.number}`);
    const trace = await response.blob();
    const content = JSON.parse(await trace.text());
    if (wanted !== drawn) return; // another one is
    at("timeline").hidden = at("save").hidden = false;
    const rest = showTimeline(at("timeline"), content, { from: 0, until: request.seconds * 1000 });
    at("cold").textContent += rest.replace(/^[^;]*/, "") + ".";
    URL.revokeObjectURL(at("save").href);
    at("save").href = URL.createObjectURL(trace);
  } catch (error) {
    if (wanted !== drawn) return;
    drawn = ""; // the next event, or another choice, tries again
    at("cold").textContent = `${titleOf(request)}; no timeline: ${error.message}`;
  }
}

at("which").onchange = draw;
