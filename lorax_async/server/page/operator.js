// What the operator does with adapters: load, unload, pin.

import { post } from "./calls.js";
import { at } from "./elements.js";

export async function act(call, body) {
  at("refused").textContent = "";
  at("done").textContent = "working …";
  try {
    const response = await post(`v1/${call}_lora_adapter`, body);
    at("done").textContent = await response.text();
  } catch (error) {
    at("done").textContent = "";
    at("refused").textContent = error.message;
  }
}

at("load").onsubmit = (event) => {
  event.preventDefault();
  const [name, path] = [at("name").value.trim(), at("path").value.trim()];
  act("load", { lora_name: name, lora_path: path, load_inplace: at("inplace").checked });
};
