"""What sources are asked, as one text, by which their answers are noted."""

from __future__ import annotations

from typing import NamedTuple

from lorax_async.adapter import AdapterRef


class Asked(NamedTuple):
    """A question's parts; "" where nothing was said."""

    source: str
    text: str
    revision: str
    scope: str


def question_of(ref: AdapterRef, scope: str) -> str:
    return "\n".join(Asked(ref.source or "", ref.text, ref.revision or "", scope))


def asked_in(question: str) -> Asked | None:
    """None for a question that is not of this form."""
    parts = question.split("\n")
    return Asked(*parts) if len(parts) == len(Asked._fields) else None
