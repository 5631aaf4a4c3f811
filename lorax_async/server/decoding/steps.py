"""A batch of the scheduler as a step of a decoder, and what came of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from lorax_async.errors import AdapterFormatError, InternalError, LoraxError
from lorax_async.scheduling.batch import Batch, BatchRow
from lorax_async.scheduling.requests import Ticket
from lorax_async.server.decoding.answer import Answer
from lorax_async.server.decoding.sampling import choose
from lorax_async.server.ports import Computed, Decoder, Part, Step


@dataclass(slots=True)
class Outcome:
    """What came of a step's rows.

    Attributes
    ----------
    tokens
        New ones.
    again
        Of whom nothing came.
    failed
        Whose logits are no numbers, or all of them, if the decoder failed.
    """

    tokens: dict[Answer, int] = field(default_factory=dict)
    again: list[Ticket] = field(default_factory=list)
    failed: dict[Ticket, LoraxError] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Work:
    """The rows of a batch, and whose they are."""

    batch: Batch
    rows: Sequence[tuple[BatchRow, Answer]]
    step: Step

    @classmethod
    def of(cls, batch: Batch, answers: Mapping[Ticket, Answer]) -> Work:
        rows = [(row, answers[row.ticket]) for row in batch.rows]
        parts = [
            Part(
                answer.number,
                row.start,
                answer.known[row.start : row.start + row.tokens],
                row.handle,
            )
            for row, answer in rows
        ]
        return cls(batch, rows, Step(parts, batch.budget, lambda: batch.others_wait))

    def compute(self, decoder: Decoder, gone: Iterable[int]) -> Outcome:
        """Forget the sequences that are `gone`, and compute the step. Blocks, in a thread."""
        try:
            for number in gone:
                decoder.forget(number)
            return self._chosen(decoder.compute(self.step))
        except Exception as error:  # noqa: BLE001 - whoever computes, the engine goes on
            return Outcome(failed={row.ticket: _located(error) for row, _ in self.rows})

    def _chosen(self, computed: Computed) -> Outcome:
        outcome = Outcome(again=[self.rows[number][0].ticket for number in computed.out])
        numbers = [
            number
            for number, (row, _) in enumerate(self.rows)
            if row.last and number not in computed.out
        ]
        rows = [self.rows[number] for number in numbers]
        tokens = choose(computed.logits[numbers], [answer.sampler for _, answer in rows])
        for (row, answer), token in zip(rows, tokens, strict=True):
            if token is None:
                outcome.failed[row.ticket] = _no_numbers(row)
            else:
                outcome.tokens[answer] = token
        return outcome


def _no_numbers(row: BatchRow) -> LoraxError:
    if row.handle is None:
        return InternalError("the base gave logits that are no numbers")
    return AdapterFormatError("with its weights the logits are no numbers", stage="ready")


def _located(error: Exception) -> LoraxError:
    if isinstance(error, LoraxError):
        return error
    found = InternalError(f"the decoder failed: {type(error).__name__}: {error}")
    found.__cause__ = error
    return found
