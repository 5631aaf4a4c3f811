"""The names that requests use: the base's, and the operator's names for adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from lorax_async.errors import AccessDeniedError, InvalidAdapterIdError
from lorax_async.ids import Allow, is_covered, parse_ref
from lorax_async.types import AdapterId, AdapterRef


class ModelNames:
    """The base's name, and a changing table of names for adapters.

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
            self.add(name, adapter)

    @property
    def adapters(self) -> Mapping[str, AdapterId]:
        """The adapters by name."""
        return MappingProxyType(self._adapters)

    def resolve(self, model: str) -> AdapterId | None:
        """Return the adapter that a request's `model` names; None is the base.

        An unknown name is an id. It stays text, so that it is local only below `local_roots`.
        Raise `AccessDeniedError` for an id that requests may not name.
        """
        if model == self.base:
            return None
        if model not in self._adapters and not is_requestable(AdapterRef(model), self._sources):
            raise AccessDeniedError(
                "requests may name the models of this server (GET /v1/models), but not this id;"
                " the operator can allow it with --source",
                id=model,
                stage="resolve",
            )
        return self._adapters.get(model, model)

    def name_of(self, adapter: AdapterId) -> str | None:
        """Return the first name of an adapter."""
        return next(iter(self._names.get(adapter, ())), None)

    def add(self, name: str, adapter: AdapterId) -> None:
        """Name an adapter; a name in use changes its meaning."""
        self._detach(name)
        self._adapters[name] = adapter
        self._names.setdefault(adapter, {})[name] = None

    def remove(self, name: str) -> AdapterId | None:
        """Forget a name; return the adapter that it named, if any."""
        self._detach(name)
        return self._adapters.pop(name, None)

    def _detach(self, name: str) -> None:
        adapter = self._adapters.get(name)
        if adapter is not None:
            names = self._names[adapter]
            del names[name]
            if not names:
                del self._names[adapter]


def is_requestable(ref: AdapterRef, sources: Sequence[Allow]) -> bool:
    """Return whether `sources` let requests name this id.

    The loader judges folders by its `local_roots`, and refuses malformed ids.
    """
    try:
        parsed_ref = parse_ref(ref)
    except InvalidAdapterIdError:
        return True
    return parsed_ref.source == "local" or is_covered(parsed_ref, sources)
