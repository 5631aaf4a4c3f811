// The list of adapters: where each one is, and what the operator can do with it.

import { at, element, size } from "./elements.js";
import { act } from "./operator.js";

const rows = new Map(); // by id: the item, and its row
let base = "";
let operator = false;

export function showAdapters({ rows: changed = {}, gone = [], more, ...rest }) {
  const known = rows.size;
  if (rest.base !== undefined) {
    // A stream begins with all rows: those that are known keep their place and the focus.
    ({ base, operator } = rest);
    gone = [...rows.keys()].filter((id) => !Object.hasOwn(changed, id));
  }
  gone.forEach(remove);
  for (const [id, row] of Object.entries(changed)) showRow(id, row);
  if (rest.base !== undefined || gone.length || rows.size !== known) {
    at("none").hidden = rows.size > 0;
    const names = [base, ...[...rows.keys()].filter(isNamed)];
    at("models").replaceChildren(...names.map((name) => new Option(name, name)));
  }
  if (more !== undefined) at("more").textContent = more ? `and ${more} more with names, which can be asked, too` : "";
}

const isNamed = (id) => !id.startsWith("\0");

function remove(id) {
  const item = rows.get(id)?.item;
  const near = item?.nextElementSibling ?? item?.previousElementSibling;
  if (item?.contains(document.activeElement)) near?.querySelector("button")?.focus();
  item?.remove();
  rows.delete(id);
}

function showRow(id, row) {
  const item = rows.get(id)?.item ?? newItem(id, row.name);
  rows.set(id, { item, row });
  item.firstElementChild.replaceChildren(
    element("span", { className: "name" }, row.name),
    element("span", { className: `tier ${row.tier}` }, row.tier === "source" ? "not loaded" : row.tier),
    element("span", { className: "more" }, details(row)),
  );
  if (!isNamed(id)) return;
  const pin = row.pinned ? "Unpin" : "Pin";
  Object.assign(item.querySelector(".pin"), { textContent: pin, ariaLabel: `${pin} ${row.name}` });
  item.querySelector(".actions").hidden = !operator;
}

function newItem(id, name) {
  const item = element("li", {}, element(isNamed(id) ? "button" : "div"));
  at("adapters").append(item);
  if (!isNamed(id)) return item;
  item.firstElementChild.onclick = () => {
    at("model").value = name;
    at("prompt").focus();
  };
  const pin = () => act(rows.get(id).row.pinned ? "unpin" : "pin", { lora_name: name });
  const unload = () => {
    const question = `Unload ${name}? Requests for this name are refused until it is loaded again.`;
    if (confirm(question)) act("unload", { lora_name: name });
  };
  const unloading = element("button", { ariaLabel: `Unload ${name}`, onclick: unload }, "Unload");
  item.append(element("div", { className: "actions" }, element("button", { className: "pin", onclick: pin }), unloading));
  return item;
}

function details(row) {
  const parts = [row.state];
  if (row.state === "filling" && row.layers) parts.push(`${row.layers[0]} of ${row.layers[1]} layers`);
  if (row.bytes) parts.push(size(row.bytes));
  if (row.pinned) parts.push("pinned");
  if (row.leases) parts.push(row.leases === 1 ? "in use" : `in use by ${row.leases}`);
  return [...parts, row.error].filter(Boolean).join(", ");
}
