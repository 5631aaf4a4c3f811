"""From a request's body and token ids to what the engine is asked for."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from lorax_async.adapter import AdapterId
from lorax_async.server.calls.errors import Refusal
from lorax_async.server.calls.requests import (
    MAX_SEED,
    MIN_SEED,
    Body,
    ChatBody,
    CompletionBody,
)
from lorax_async.server.calls.service import Service
from lorax_async.server.generation import Generation, Sampling


def require_few(body: Body, most: int) -> None:
    """Raise `Refusal` if one request asks for too many sequences."""
    prompts = len(body.prompts) if isinstance(body, CompletionBody) else 1
    if prompts * (body.n or 1) > most:
        raise Refusal(
            400,
            f"A request may ask for {most} sequences at most: its prompts, times n",
            param="n" if prompts == 1 else "prompt",
            code="invalid_value",
        )


def generations_of(
    service: Service,
    body: Body,
    adapter: AdapterId | None,
    prompts: Sequence[tuple[int, ...]],
    client: Hashable = None,
) -> list[Generation]:
    """`n` for each prompt, one prompt after the other. Raises `Refusal`."""
    found: list[Generation] = []
    for prompt in prompts:
        room = _room_after(service, prompt, "messages" if isinstance(body, ChatBody) else "prompt")
        wanted = room if body.wanted_tokens is None else body.wanted_tokens
        if wanted > room:
            raise _too_long(service, f"{len(prompt)} tokens of the prompt and {wanted} new ones")
        for _ in range(body.n or 1):
            found.append(
                Generation(
                    adapter,
                    prompt,
                    wanted,
                    _sampling_of(body, len(found)),
                    frozenset() if body.ignore_eos else service.stop_tokens,
                    client=client,
                )
            )
    return found


def _room_after(service: Service, prompt: Sequence[int], param: str) -> int:
    if len(prompt) > service.max_prompt_tokens:
        raise _too_long(service, f"a prompt of {len(prompt)} tokens", param)
    return service.engine.max_length - len(prompt)


def _too_long(service: Service, asked: str, param: str = "max_tokens") -> Refusal:
    return Refusal(
        400,
        f"This model takes {service.engine.max_length} tokens, new ones included, and prompts of"
        f" {service.max_prompt_tokens}; this request has {asked}",
        param=param,
        code="context_length_exceeded",
    )


def _sampling_of(body: Body, number: int) -> Sampling:
    """Sequences of one request differ: the first has the request's seed, the next one more."""
    return Sampling(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=None if body.seed is None else _as_seed(body.seed + number),
    )


def _as_seed(number: int) -> int:
    """After the largest seed comes the smallest."""
    return (number - MIN_SEED) % (MAX_SEED - MIN_SEED + 1) + MIN_SEED
