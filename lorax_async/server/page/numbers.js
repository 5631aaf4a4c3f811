// Numbers of the whole server: slots, memory, hits, the queue, tokens.

import { at, size } from "./elements.js";

export function showNumbers(numbers) {
  const [used, all] = numbers.slots;
  showBar("slots", `${used} of ${all} used, ${all - used} free`, numbers.slots);
  for (const tier of ["device", "host", "pinned"]) {
    const budget = numbers.memory[tier];
    at(`${tier}-memory`).hidden = !budget;
    if (budget) showBar(tier, budget.map(size).join(" of "), budget);
  }
  const [found, loads] = numbers.hits;
  at("hits").textContent = loads ? `${((100 * found) / loads).toFixed(0)} % of ${loads} loads` : "no load yet";
  at("queue").textContent = `${numbers.running} running, ${numbers.waiting} waiting`;
  at("rate").textContent = numbers.tokens_per_second.toFixed(1);
}

function showBar(id, words, [used, all]) {
  at(id).textContent = words;
  const bar = at(`${id}-bar`);
  bar.max = all;
  bar.value = used;
}
