// The list of adapters: where each one is, and what the operator can do with it.

import { at, button, size, text } from "./elements.js";
import { pin, unload, unpin } from "./operator.js";

const rows = new Map(); // by id: the item, and its row
let base = "";
let operator = false;

export function showAdapters(changes) {
  const known = rows.size;
  let gone = changes.gone ?? [];
  if (changes.base !== undefined) {
    // It has all rows; those that are known keep their place and the focus.
    gone = [...rows.keys()].filter((id) => !Object.hasOwn(changes.rows, id));
    ({ base, operator } = changes);
  }
  gone.forEach(remove);
  for (const [id, row] of Object.entries(changes.rows ?? {})) showRow(id, row);
  if (changes.base !== undefined || gone.length || rows.size !== known) {
    at("none").hidden = rows.size > 0;
    const names = [base, ...[...rows.keys()].filter((id) => !id.startsWith("\0"))];
    at("models").replaceChildren(...names.map((name) => new Option(name, name)));
  }
  if (changes.more !== undefined) {
    at("more").textContent = changes.more ? `and ${changes.more} more with names, which can be asked, too` : "";
  }
}

function remove(id) {
  const item = rows.get(id)?.item;
  const near = item?.nextElementSibling ?? item?.previousElementSibling;
  if (item?.contains(document.activeElement)) near?.querySelector("button")?.focus();
  item?.remove();
  rows.delete(id);
}

function showRow(id, row) {
  const item = rows.get(id)?.item ?? newItem(id, row);
  rows.set(id, { item, row });
  const filling = row.state === "filling" && row.layers;
  item.firstElementChild.replaceChildren(
    text("name", row.name),
    text(`tier ${row.tier}`, row.tier === "source" ? "not loaded" : row.tier),
    text("more", details(row)),
    ...(filling ? [bar(row.layers)] : []),
  );
  const actions = item.querySelector(".actions");
  if (!actions) return;
  actions.hidden = !operator;
  name(actions.firstElementChild, row.pinned ? "Unpin" : "Pin", row);
}

function newItem(id, row) {
  const item = document.createElement("li");
  at("adapters").append(item);
  if (!row.named) {
    item.append(document.createElement("div"));
    return item;
  }
  const actions = document.createElement("div");
  actions.className = "actions";
  const toggle = () => (rows.get(id).row.pinned ? unpin(row.name) : pin(row.name));
  actions.append(button("", toggle), name(button("", () => unload(row.name)), "Unload", row));
  item.append(button("", () => choose(row.name)), actions);
  return item;
}

function name(action, word, row) {
  action.textContent = word;
  action.setAttribute("aria-label", `${word} ${row.name}`);
  return action;
}

function choose(name) {
  at("model").value = name;
  at("prompt").focus();
}

function details(row) {
  const parts = [];
  if (row.state) parts.push(row.state);
  if (row.state === "filling" && row.layers) parts.push(`${row.layers[0]} of ${row.layers[1]} layers`);
  if (row.bytes) parts.push(size(row.bytes));
  if (row.pinned) parts.push("pinned");
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
