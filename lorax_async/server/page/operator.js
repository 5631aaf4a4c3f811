// What the operator does with adapters: load, unload, pin.

import { post } from "./calls.js";
import { at } from "./elements.js";

async function act(call, body, doing) {
  at("refused").textContent = "";
  at("done").textContent = doing;
  try {
    const response = await post(`v1/${call}_lora_adapter`, body);
    at("done").textContent = await response.text();
  } catch (error) {
    at("done").textContent = "";
    at("refused").textContent = error.message;
  }
}

export const pin = (name) => act("pin", { lora_name: name }, `pinning ${name} …`);
export const unpin = (name) => act("unpin", { lora_name: name }, `unpinning ${name} …`);

export function unload(name) {
  const question = `Unload ${name}? Requests for this name are refused until it is loaded again.`;
  if (confirm(question)) act("unload", { lora_name: name }, `unloading ${name} …`);
}

at("load").onsubmit = (event) => {
  event.preventDefault();
  const name = at("name").value.trim();
  const body = { lora_name: name, lora_path: at("path").value.trim(), load_inplace: at("inplace").checked };
  act("load", body, `loading ${name} …`);
};
