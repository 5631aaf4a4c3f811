"""What requests call the base, and adapters that the operator named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from lorax_async.adapter import AdapterId, AdapterRef
from lorax_async.errors import AccessDeniedError, InvalidAdapterIdError
from lorax_async.ids.parsing import is_covered, parsed
from lorax_async.settings.allow import Allow


class Names:
    """The base's name, and names for adapters, which come and go.

    `sources` are the places below which a request may name adapters by id.
    """

    def __init__(
        self, base: str, adapters: Mapping[str, AdapterId], sources: Sequence[Allow] = ()
    ) -> None:
        self.base = base
        self._sources = tuple(sources)
        self._adapters: dict[str, AdapterId] = {}
        self._names: dict[AdapterId, dict[str, None]] = {}
        for name, adapter in adapters.items():
            self.put(name, adapter)

    @property
    def adapters(self) -> Mapping[str, AdapterId]:
        """What each name stands for."""
        return MappingProxyType(self._adapters)

    def find(self, model: str) -> AdapterId | None:
        """What a request's `model` means: None is the base; what has no name here is an id.

        A request's text stays text, so that it is local only below `local_roots`. Raises
        `AccessDeniedError` for an id that requests may not name.
        """
        if model == self.base:
            return None
        if model not in self._adapters and not is_open(AdapterRef(model), self._sources):
            raise AccessDeniedError(
                "requests may name the models of this server (GET /v1/models), and no adapter"
                " there by its id; the operator can allow that: --source",
                id=model,
                stage="resolve",
            )
        return self._adapters.get(model, model)

    def name_of(self, adapter: AdapterId) -> str | None:
        """The first name that stands for it."""
        return next(iter(self._names.get(adapter, ())), None)

    def put(self, name: str, adapter: AdapterId) -> None:
        self._leave(name)
        self._adapters[name] = adapter
        self._names.setdefault(adapter, {})[name] = None

    def take(self, name: str) -> AdapterId | None:
        """Forget a name; what it stood for, or None if it was none."""
        self._leave(name)
        return self._adapters.pop(name, None)

    def _leave(self, name: str) -> None:
        adapter = self._adapters.get(name)
        if adapter is not None:
            names = self._names[adapter]
            del names[name]
            if not names:
                del self._names[adapter]


def is_open(ref: AdapterRef, sources: Sequence[Allow]) -> bool:
    """Return whether a request may name this id, as far as `sources` say; the loader judges too.

    Folders are judged by its `local_roots`, and what is no id is refused by it.
    """
    try:
        found = parsed(ref)
    except InvalidAdapterIdError:
        return True
    return found.source == "local" or is_covered(found, sources)
