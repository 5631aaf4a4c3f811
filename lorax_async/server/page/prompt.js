// A prompt and its answer.

import { eventsOf, post } from "./calls.js";
import { at, milliseconds } from "./elements.js";

let asking = null;

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
    const body = {
      model: at("model").value.trim(),
      messages: [{ role: "user", content: at("prompt").value }],
      stream: true,
      stream_options: { include_usage: true },
      max_tokens: 256,
    };
    const response = await post("v1/chat/completions", body, mine.signal);
    for await (const chunk of eventsOf(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      const content = chunk.choices[0]?.delta?.content;
      if (content && first === null) {
        first = performance.now();
        at("times").textContent = "answering";
      }
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
