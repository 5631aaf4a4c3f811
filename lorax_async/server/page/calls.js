// Calls of the server, with the key that was given: it is in this page's memory only.

export const key = { text: "" }; // the admin token or an API key

export async function ask(path, options = {}) {
  const headers = { ...options.headers, ...(key.text && { Authorization: `Bearer ${key.text}` }) };
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  const { status } = response;
  throw Object.assign(new Error(body?.error?.message ?? `status ${status}`), { status });
}

export function post(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  return ask(path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

// Server-sent events of any request: EventSource can send neither a body nor a key.
export async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        if (part === "data: [DONE]") return;
        const event = JSON.parse(part.slice("data: ".length));
        if (event.error) throw new Error(event.error.message);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
