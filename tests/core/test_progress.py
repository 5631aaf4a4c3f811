"""A sequence's tokens, counted by hand."""

from __future__ import annotations

from lorax_async.core.progress import Progress


def test_a_prompt_then_a_token_at_a_time() -> None:
    progress = Progress(10, 3)
    assert (progress.position, progress.wants, progress.generated) == (0, 10, 0)
    assert not progress.advance(10)
    assert (progress.position, progress.wants, progress.generated) == (10, 1, 1)
    assert not progress.advance(1)
    assert progress.advance(1)
    assert (progress.position, progress.generated) == (12, 3)


def test_a_part_of_a_prompt_brings_no_token() -> None:
    progress = Progress(10, 1)
    assert not progress.advance(6)
    assert (progress.position, progress.wants, progress.generated) == (6, 4, 0)
    assert progress.advance(4)


def test_what_came_out_is_computed_again_after_a_restart() -> None:
    progress = Progress(10, 5)
    progress.advance(10)
    progress.advance(1)
    progress.restart()
    assert (progress.position, progress.wants, progress.generated) == (0, 12, 2)
    assert not progress.advance(12)
    assert progress.generated == 3
