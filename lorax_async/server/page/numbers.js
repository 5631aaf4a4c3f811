// Numbers of the whole server: slots, memory, hits, the queue, tokens.

import { at, element, size } from "./elements.js";

const MEMORY = [["device", "Device memory"], ["host", "Host memory"], ["pinned", "Page-locked memory"]];

export function showNumbers({ slots, memory, hits, running, waiting, tokens_per_second }) {
  const [used, all] = slots;
  const [found, loads] = hits;
  at("numbers").replaceChildren(
    entry("slots", "Slots", `${used} of ${all} used, ${all - used} free`, slots),
    ...MEMORY.filter(([tier]) => memory[tier][1]).map(([tier, title]) =>
      entry(tier, title, memory[tier].map(size).join(" of "), memory[tier]),
    ),
    entry("hits", "Hit rate", loads ? `${((100 * found) / loads).toFixed(0)} % of ${loads} loads` : "no load yet"),
    entry("queue", "Queue", `${running} running, ${waiting} waiting`),
    entry("rate", "Tokens/s, over 10 s", tokens_per_second.toFixed(1)),
  );
}

function entry(id, title, words, [value, max] = []) {
  const bar = max ? [element("meter", { id: `${id}-bar`, ariaLabel: title, max, value })] : [];
  return element("div", {}, element("dt", {}, title), element("dd", { id }, words, ...bar));
}
