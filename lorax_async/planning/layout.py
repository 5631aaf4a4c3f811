"""The modules of a base model that adapters can change, with their shapes and layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from hashlib import sha256
from typing import TypeAlias, TypeVar

from lorax_async.config import DTYPES
from lorax_async.errors import ConfigError

T = TypeVar("T")


class Parallelism(Enum):
    """How tensor parallelism cuts a module: by output or input features, or not at all."""

    COLUMN = "column"
    ROW = "row"
    REPLICATED = "replicated"


@dataclass(frozen=True, slots=True)
class FusedPart:
    """Output features that tensor parallelism cuts separately, for example the q of a fused qkv.

    `unit` features stay together, like those of an attention head. If there are more ranks than
    units and the part is `replicable` (k and v heads), several ranks hold the same unit.
    """

    size: int
    unit: int = 1
    replicable: bool = False


@dataclass(frozen=True, slots=True)
class Module:
    """One linear module of a base model, or an embedding.

    `name` is its path in the base model, as in `named_modules`. An adapter's A is
    `[rank, in_features]`, its B `[out_features, rank]`; the `in_features` of an `embedding` are the
    size of the vocabulary. `layer` is its layer group: -1 before the layers, 0 … L-1, L after them.
    `transposed` is whether the base stores the weight as `[in, out]` (GPT-2's Conv1D), which does
    not affect A and B. `parts` are those of a fused output or one with heads, whose sizes sum to
    `out_features`; none means one part that can be cut anywhere.
    """

    name: str
    in_features: int
    out_features: int
    layer: int
    parallel: Parallelism
    transposed: bool = False
    parts: tuple[FusedPart, ...] = ()
    embedding: bool = False

    @property
    def weight_shape(self) -> tuple[int, int]:
        """The shape in which the base stores the weight."""
        sizes = self.out_features, self.in_features
        return sizes[::-1] if self.transposed or self.embedding else sizes


@dataclass(frozen=True, slots=True)
class OtherModule:
    """A module of a base model that adapters can only replace: a norm, a convolution.

    `weight` and `bias` are the shapes of these parameters, None for one that it does not have.
    `layer` is as in `Module`.
    """

    name: str
    weight: tuple[int, ...] | None
    bias: tuple[int, ...] | None
    layer: int

    @property
    def embedding(self) -> bool:
        """False: as `Module`, for one that adapters only replace."""
        return False


@dataclass(frozen=True, slots=True)
class Parameter:
    """A bare parameter that adapters can change, of fused experts or a router.

    `module` is the path of what has it and `key` its name there. The `shape` is `[out, in]`, or
    with E experts `[E, out, in]`, `[E, in, out]` if `transposed`. `layer` is as in `Module`.
    """

    module: str
    key: str
    shape: tuple[int, ...]
    layer: int
    transposed: bool = False

    @property
    def name(self) -> str:
        """The path of the parameter, as in `named_parameters`."""
        return f"{self.module}.{self.key}"

    @property
    def experts(self) -> int:
        return self.shape[0] if len(self.shape) > 2 else 1

    @property
    def sizes(self) -> tuple[int, int]:
        """(out, in) of each expert."""
        first, second = self.shape[-2:]
        return (second, first) if self.transposed else (first, second)

    @property
    def embedding(self) -> bool:
        """False: as `Module`."""
        return False


Adaptable: TypeAlias = Module | OtherModule | Parameter


@dataclass(frozen=True)
class ModelLayout:
    """The linear modules of one base model, in layer order. Immutable, equal and hashed by value.

    `modules` may be given in any order; they are stored in layer order, stably sorted, and the
    position in this tuple indexes the device's tables. `dtype`, which the model computes in, is
    "F32", "F16" or "BF16". `backbone_prefix` is the prefix of the backbone's names in a model with
    a head ("model."), or "". `text_prefixes` are, for a model of text and images, pairs of a prefix
    in its text class and the same in this one ("model.", "model.language_model.").

    The rest is not compared. `base` is the model's folder or hub id and `architecture` its class,
    for errors. `others` are indexed after `modules`; a base's config does not tell them.
    `parameters` are indexed after those; the ones of a module are in its own order. `renames` are
    prefixes of modules in former versions of transformers, each with what takes its place, in this
    order.

    Raise `ConfigError` for inconsistent values.
    """

    modules: tuple[Module, ...]
    num_layers: int
    dtype: str = "BF16"
    backbone_prefix: str = ""
    text_prefixes: tuple[tuple[str, str], ...] = ()
    base: str = field(default="", compare=False)
    architecture: str = field(default="", compare=False)
    others: tuple[OtherModule, ...] = field(default=(), compare=False)
    parameters: tuple[Parameter, ...] = field(default=(), compare=False)
    renames: tuple[tuple[str, str], ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        ordered = tuple(sorted(self.modules, key=lambda module: module.layer))
        object.__setattr__(self, "modules", ordered)
        if self.dtype not in DTYPES.values():
            raise ConfigError(
                f"layout: dtype must be one of {', '.join(DTYPES.values())}, not {self.dtype!r}"
            )
        if not (ordered or self.parameters) or self.num_layers < 1:
            raise ConfigError("layout: a model needs at least one layer and one linear module")
        for module in ordered:
            self._check(module)
        if len(self._index) < len(ordered):
            raise ConfigError("layout: two modules have the same name")

    def _check(self, module: Module) -> None:
        if not module.name or module.in_features < 1 or module.out_features < 1:
            raise ConfigError(f"layout: a module needs a name and positive sizes, not {module}")
        if not -1 <= module.layer <= self.num_layers:
            raise ConfigError(
                f"layout: module {module.name!r} is in layer {module.layer}, "
                f"outside -1 … {self.num_layers}"
            )
        if any(part.unit < 1 or part.size < 1 or part.size % part.unit for part in module.parts):
            raise ConfigError(f"layout: parts need positive whole units, not {module.parts}")
        if module.parts and sum(part.size for part in module.parts) != module.out_features:
            raise ConfigError(f"layout: the parts of {module.name!r} do not sum to its output")

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @cached_property
    def _index(self) -> Mapping[str, int]:
        return {module.name: position for position, module in enumerate(self.modules)}

    @cached_property
    def _other_index(self) -> Mapping[str, int]:
        first = len(self.modules)
        return {module.name: first + number for number, module in enumerate(self.others)}

    @cached_property
    def _parameter_index(self) -> Mapping[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}
        for number, it in self.parameters_by_index.items():
            found[it.module] = (*found.get(it.module, ()), number)
        return found

    @cached_property
    def fingerprint(self) -> str:
        """The first 16 hexadecimal digits of a SHA-256 over every field, equal in every process."""
        words = [str(self.num_layers), self.dtype, self.backbone_prefix]
        words += [word for pair in self.text_prefixes for word in pair]
        for m in self.modules:
            words += [ascii(m.name), str(m.in_features), str(m.out_features), str(m.layer)]
            words += [m.parallel.value, str(m.transposed), str(m.embedding)]
            words += [f"{part.size}/{part.unit}/{part.replicable}" for part in m.parts]
        return sha256("\0".join(words).encode()).hexdigest()[:16]

    def replicate(self, *names: str) -> ModelLayout:
        """Return this layout with the named modules replicated on every rank.

        A name is a module's path or the end of one ("lm_head", "attn.c_attn"). Raises
        `ConfigError` for a name without a module.
        """
        for name in names:
            if not any(_ends_with(module.name, name) for module in self.modules):
                raise ConfigError(f"layout: no module is called {name!r}")
        modules = tuple(
            replace(module, parallel=Parallelism.REPLICATED)
            if any(_ends_with(module.name, name) for name in names)
            else module
            for module in self.modules
        )
        return replace(self, modules=modules)

    def index(self, name: str) -> int:
        """Return the position of the module `name`; raise KeyError if there is none."""
        return self._index[name]

    def resolve(self, path: str) -> int | None:
        """Return the position of the module that an adapter calls `path`, or None.

        An adapter trained on the bare backbone omits the prefix (`layers.0…` for
        `model.layers.0…`), and one trained on the text class of a model of text and images has that
        one's; an exact match comes first.
        """
        return self._resolve(path, self._index)

    def resolve_whole(self, path: str) -> int | None:
        """Return the index of a module or other module, as `resolve`."""
        found = self._resolve(path, self._index)
        return self._resolve(path, self._other_index) if found is None else found

    @cached_property
    def parameters_by_index(self) -> Mapping[int, Parameter]:
        return dict(enumerate(self.parameters, len(self.modules) + len(self.others)))

    def parameters_of(self, path: str) -> tuple[int, ...]:
        """Return the indices of the parameters of a module, as `resolve`; none if it has none."""
        return self._resolve(path, self._parameter_index) or ()

    def _resolve(self, path: str, index: Mapping[str, T]) -> T | None:
        found = index.get(path)
        if found is None:
            found = index.get(self.backbone_prefix + path)
        for text, own in self.text_prefixes if found is None else ():
            if found is None and path.startswith(text):
                found = index.get(own + path.removeprefix(text))
        return found

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all modules and parameters, by index."""
        names = [it.name for it in self.modules] + [it.name for it in self.others]
        return (*names, *(it.name for it in self.parameters))

    def has(self, path: str) -> bool:
        """Return whether a module, other module or module of parameters has exactly this name."""
        return path in self._index or path in self._other_index or path in self._parameter_index

    def rename(self, path: str) -> str:
        """Return the present path of a module that former versions of transformers called `path`.

        Like PEFT, leave alone what would only lose the beginning of its name in the file.
        """
        renamed = path
        for before, now in self.renames:
            if renamed == before or renamed.startswith(f"{before}."):
                renamed = now + renamed.removeprefix(before)
        return path if f".model.{path}".endswith(f".{renamed}") else renamed

    def at(self, index: int) -> Adaptable:
        """Return the module, other module or parameter of an index."""
        if index < len(self.modules):
            return self.modules[index]
        index -= len(self.modules)
        others = len(self.others)
        return self.others[index] if index < others else self.parameters[index - others]


def _ends_with(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")
