// A prompt and its answer.

import { eventsOf, post } from "./calls.js";
import { at, milliseconds } from "./elements.js";

let asking = null;

async function send() {
  asking?.abort();
  const mine = (asking = new AbortController());
  at("error").textContent = at("answer").textContent = "";
  at("times").textContent = "waiting for the first token";
  at("answer").ariaBusy = "true"; // read aloud once it is complete
  at("stop").disabled = false;
  try {
    at("times").textContent = await showAnswer(mine.signal);
  } catch (error) {
    if (mine !== asking) return; // another one was sent
    at("times").textContent = mine.signal.aborted ? "stopped" : "";
    at("error").textContent = mine.signal.aborted ? "" : error.message;
  }
  if (mine !== asking) return;
  at("answer").ariaBusy = "false";
  if (document.activeElement === at("stop")) at("send").focus(); // a disabled button loses it
  at("stop").disabled = true;
}

async function showAnswer(signal) {
  const began = performance.now();
  let [first, tokens] = [null, 0];
  const body = {
    model: at("model").value.trim(),
    messages: [{ role: "user", content: at("prompt").value }],
    stream: true,
    stream_options: { include_usage: true },
    max_tokens: 256,
  };
  for await (const chunk of eventsOf(await post("v1/chat/completions", body, signal))) {
    const content = chunk.choices[0]?.delta?.content;
    tokens = chunk.usage?.completion_tokens ?? tokens;
    if (!content) continue;
    at("times").textContent = "answering";
    at("answer").append(content);
    first ??= performance.now();
  }
  if (first === null) return "ended without a word";
  const rate = (1000 * (tokens - 1)) / (performance.now() - first);
  const times = `first token after ${milliseconds(first - began)}; ${tokens} tokens`;
  return rate > 0 ? `${times}, ${rate.toFixed(1)} tokens/s` : times;
}

at("try").onsubmit = (event) => {
  event.preventDefault();
  send();
};
at("stop").onclick = () => asking?.abort();
at("try").onkeydown = (event) => {
  if (event.key === "Escape") asking?.abort();
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  at("try").requestSubmit();
};
