"""Which adapter each row uses, in which thread and for how long; and what is refused instead.

The oracle of answers is the model itself; PEFT's are in test_peft_equality.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from engines.variants import PEFT_WARNING, logits_of, prompt, serving
from lorax_async import HandleClosedError, UsageError

pytestmark = [pytest.mark.filterwarnings(PEFT_WARNING)]

Run = Callable[[Coroutine[Any, Any, Any]], Any]


# -- with and without a batch ------------------------------------------------------------------


async def test_a_pass_without_a_batch_is_refused(small: Any) -> None:
    async with serving(small):
        with pytest.raises(UsageError, match=r"attached\.batch"):
            logits_of(small, prompt(1))


def test_no_rows_at_all_means_the_base_for_any_number(small: Any) -> None:
    expected = [logits_of(small, prompt(count)) for count in (1, 3)]

    async def main() -> None:
        async with serving(small) as (_, attached):
            with attached.batch(None):
                for count, logits in zip((1, 3), expected, strict=True):
                    assert torch.equal(logits_of(small, prompt(count)), logits)

    asyncio.run(main())


def test_a_block_inside_a_block_gives_way_to_the_outer_one(small: Any) -> None:
    async def main() -> None:
        async with serving(small) as (_, attached):
            with attached.batch([None]):
                with attached.batch([None, None]):
                    logits_of(small, prompt(2))
                logits_of(small, prompt(1))
            with pytest.raises(UsageError, match="no batch"):
                logits_of(small, prompt(1))

    asyncio.run(main())


def test_a_module_that_returns_its_own_input_is_refused(
    small: Any, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its input would be read where its output is written already."""
    name = "model.layers.0.self_attn.q_proj"
    monkeypatch.setattr(small.get_submodule(name), "forward", lambda x: x)

    async def main() -> None:
        async with serving(small) as (loader, attached):
            handle = await loader.load(adapters[0])
            with (
                attached.batch([handle]),
                pytest.raises(UsageError, match=f"{name}.* y and x in memory of their own"),
            ):
                logits_of(small, prompt(1))
            handle.release()

    asyncio.run(main())


def test_each_row_has_its_own_adapter(small: Any, adapters: list[Path]) -> None:
    """A row's logits do not depend on its neighbours' adapters; base rows keep their bits."""
    base = logits_of(small, prompt(3))

    async def main() -> None:
        async with serving(small) as (loader, attached):
            first, second = [await loader.load(adapter) for adapter in adapters]
            with attached.batch([first, first, first]):
                only_first = logits_of(small, prompt(3))
            with attached.batch([second, second, second]):
                only_second = logits_of(small, prompt(3))
            with attached.batch([second, None, first]):
                mixed = logits_of(small, prompt(3))
            first.release()
            second.release()
        assert torch.equal(mixed[1], base[1])
        torch.testing.assert_close(mixed[0], only_second[0])
        torch.testing.assert_close(mixed[2], only_first[2])
        assert (only_first - only_second).abs().max() > 0.01

    asyncio.run(main())


def test_a_mixed_batch_generates_what_its_rows_generate_alone(
    small: Any, adapters: list[Path]
) -> None:
    """The head gets the last tokens only, which do not lie side by side in memory."""

    def tokens(rows: slice) -> list[list[int]]:
        inputs = prompt(3)["input_ids"][rows]
        out = small.generate(inputs, max_new_tokens=6, do_sample=False)
        listed: list[list[int]] = out.tolist()
        return listed

    async def main() -> None:
        async with serving(small) as (loader, attached), AsyncExitStack() as held:
            handles = [
                await held.enter_async_context(await loader.load(adapter)) for adapter in adapters
            ]
            batch = [handles[0], None, handles[1]]
            alone = []
            for row, handle in enumerate(batch):
                with attached.batch([handle]):
                    alone += tokens(slice(row, row + 1))
            with attached.batch(batch):
                assert tokens(slice(None)) == alone
            with attached.batch(None):
                assert tokens(slice(None)) != alone

    asyncio.run(main())


@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_rows_is_refused(count: int, small: Any, adapters: list[Path]) -> None:
    async def main() -> None:
        async with serving(small) as (loader, attached), await loader.load(adapters[1]) as handle:
            for batch in ([handle, None], [None, None]):
                with (
                    attached.batch(batch),
                    pytest.raises(UsageError, match=f"{count} rows in a batch of 2"),
                ):
                    logits_of(small, prompt(count))

    asyncio.run(main())


@pytest.mark.parametrize("more", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}])
def test_beams_and_return_sequences_are_refused(
    more: dict[str, Any], small: Any, adapters: list[Path]
) -> None:
    async def main() -> None:
        async with serving(small) as (loader, attached), await loader.load(adapters[0]) as handle:
            with attached.batch([handle]):
                out = small.generate(**prompt(1), max_new_tokens=4, do_sample=False)
                assert out.shape == (1, 9)
                with pytest.raises(UsageError, match="2 rows in a batch of 1"):
                    small.generate(**prompt(1), max_new_tokens=4, **more)

    asyncio.run(main())


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_every_grad_mode_gives_the_same_answer(
    grad: Callable[[], Any], small: Any, adapters: list[Path]
) -> None:
    async def main() -> None:
        async with serving(small) as (loader, attached), await loader.load(adapters[0]) as handle:
            with attached.batch([handle, None]):
                expected = logits_of(small, prompt(2))
                with grad():
                    assert torch.equal(small(**prompt(2)).logits, expected)

    asyncio.run(main())


def test_a_gradient_that_would_miss_the_adapter_is_refused(
    small: Any, adapters: list[Path]
) -> None:
    async def main() -> None:
        async with serving(small) as (loader, attached), await loader.load(adapters[0]) as handle:
            with attached.batch([handle]):
                loss = small(**prompt(1)).logits.sum()
            with pytest.raises(UsageError, match="gradient"):
                loss.backward()

    asyncio.run(main())
    small.zero_grad(set_to_none=True)


def test_autocast_is_refused_rather_than_rounded(small: Any, adapters: list[Path]) -> None:
    async def main() -> None:
        async with serving(small) as (loader, attached), await loader.load(adapters[0]) as handle:
            with (
                attached.batch([handle]),
                torch.autocast("cpu", torch.bfloat16),
                pytest.raises(UsageError, match="autocast"),
            ):
                logits_of(small, prompt(1))

    asyncio.run(main())


# -- handles -----------------------------------------------------------------------------------


def test_only_handles_of_this_loader_are_rows(small: Any, adapters: list[Path]) -> None:
    async def main() -> None:
        async with serving(small) as (loader, attached):
            attached.detach()
            async with serving(small) as (_, theirs), await loader.load(adapters[0]) as handle:
                refused: list[tuple[Any, str]] = [
                    ([None, handle], "row 1: .* is another loader's"),
                    (["adapter"], "row 0 is a str"),
                    ([], "at least one row"),
                ]
                for batch, why in refused:
                    with pytest.raises(UsageError, match=why), theirs.batch(batch):
                        pass

    asyncio.run(main())


def test_a_released_handle_is_refused_and_leaves_the_others_free(
    small: Any, adapters: list[Path]
) -> None:
    async def main() -> None:
        async with serving(small) as (loader, attached):
            kept, released = [await loader.load(adapter) for adapter in adapters]
            released.release()
            with pytest.raises(HandleClosedError), attached.batch([kept, released]):
                pass
            attached.detach()  # no batch is open
            kept.release()
            await loader.close(timeout=5)

    asyncio.run(main())


async def test_a_handle_released_inside_the_block_keeps_its_adapter_to_its_end(
    small: Any, adapters: list[Path]
) -> None:
    """With one slot: the second adapter gets it when the block ends, and not before."""
    async with serving(small, max_slots=1) as (loader, attached):
        handle = await loader.load(adapters[0])
        with attached.batch([handle]):
            expected = logits_of(small, prompt(1))
            handle.release()
            waiting = asyncio.create_task(loader.load(adapters[1]))
            await asyncio.sleep(0.1)
            assert torch.equal(logits_of(small, prompt(1)), expected)
            assert not waiting.done()
        async with asyncio.timeout(10), await waiting as other:
            with attached.batch([other]):
                assert not torch.equal(logits_of(small, prompt(1)), expected)
