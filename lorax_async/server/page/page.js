// The page: it shows what the server's stream of events says.

import { showAdapters } from "./adapters.js";
import { ask, eventsOf, key } from "./calls.js";
import { showCold } from "./cold.js";
import { at } from "./elements.js";
import { showNumbers } from "./numbers.js";
import "./prompt.js";

const RETRY = 2000; // milliseconds until a lost server is asked again
let watching = null;
let operator = false;

async function watch() {
  watching?.abort();
  const { signal } = (watching = new AbortController());
  while (!signal.aborted) {
    try {
      const response = await ask("page/events", { signal });
      at("link").textContent = "live";
      for await (const changes of eventsOf(response)) show(changes);
      at("link").textContent = "the server has ended this; asking again";
    } catch (error) {
      if (signal.aborted) return;
      at("link").textContent = `not connected: ${error.message}`;
      // Watch without the key then; the browser itself refuses one with odd characters.
      if (error.status === 401 || error.status === 403 || /[^!-~]/.test(key.text)) key.text = "";
    }
    await new Promise((done) => setTimeout(done, RETRY));
  }
}

function show(changes) {
  if (changes.base !== undefined) {
    operator = changes.operator;
    at("base").textContent = changes.base;
    at("model").value ||= changes.base;
    if (operator) at("link").textContent = "live, all adapters";
    at("operator").hidden = !operator;
  }
  showAdapters(changes);
  if (changes.numbers) showNumbers(changes.numbers);
  if (changes.cold) showCold(changes.cold, operator);
}

at("key").onsubmit = (event) => {
  event.preventDefault();
  key.text = at("token").value.trim();
  watch();
};

watch();
