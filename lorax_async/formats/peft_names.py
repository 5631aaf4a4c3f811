"""Name PEFT's files, parse its tensor names, and decide which modules a config targets.

A tensor's name is `base_model.model.` + module path + suffix, of a kind in `tensor_kinds`. Any
other tensor is refused, if possible by the name of the PEFT feature that wrote it, because omitting
a tensor changes the outputs.
Source: peft 0.21.2, `utils/save_and_load.py`, `utils/other.py` and `tuners/lora/layer.py`; for
targets, `check_target_module_exists`, `_maybe_include_all_linear_layers` and `_check_tied_modules`
of `tuners/tuners_utils.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import re2

from lorax_async.errors import AdapterError, AdapterFormatError, UnsupportedAdapterError, shorten
from lorax_async.formats.tensor_kinds import SUFFIXES, WHOLE, TensorRole
from lorax_async.types import AdapterSpec, Matcher, ModuleNames

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
"""With the config, all files of an adapter that are read."""

TOKENIZER_FILE, TOKENIZER_CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_FILES = (
    *(TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, TEMPLATE_FILE, "chat_template.json"),
    *("special_tokens_map.json", "added_tokens.json", "tokenizer.model", "spiece.model"),
    *("sentencepiece.bpe.model", "vocab.json", "vocab.txt", "merges.txt"),
)
"""What transformers' tokenizers save, beside the adapter, where it has tokens of its own."""

INDEX_FILE = "adapter_model.safetensors.index.json"
PICKLE_FILE = "adapter_model.bin"
PICKLE_PROBLEM = (
    "a pickle, which can run any code and is never loaded as it is; re-save the adapter with"
    " safetensors (save_pretrained does by default), run `lorax-async convert` on its folder, or,"
    " as the operator, let loads convert it: LoaderConfig(convert_bin=True), serve --convert-bin,"
    " LORAX_ASYNC_CONVERT_BIN=1"
)


def split_weights_error(place: str) -> UnsupportedAdapterError:
    """Make the error for a place that has `INDEX_FILE` and no `WEIGHTS_FILE`."""
    return UnsupportedAdapterError(
        f"{place} has no {WEIGHTS_FILE}, but {INDEX_FILE}: weights in several files are not loaded"
        ' since 0.3; join them into one, as "Weights in several files" of docs/sources.md shows',
        stage="resolve",
    )


_MLX = (
    "MLX's (mlx_lm); convert it to PEFT's: transpose lora_a and lora_b, name them"
    f" 'base_model.model.<module>.lora_A.weight' and lora_B in {WEIGHTS_FILE}, and set lora_alpha"
    " to r times MLX's scale"
)
_FOR_IMAGES = "for image models; load it with diffusers: no language model has its modules"
_DIFFUSERS, _KOHYA = f"diffusers', {_FOR_IMAGES}", f"kohya's, {_FOR_IMAGES}"
FOREIGN_FILES = {"adapters.safetensors": _MLX, "pytorch_lora_weights.safetensors": _DIFFUSERS}
"""The weights of other programs, by whose names they are recognised in place of `WEIGHTS_FILE`."""

_FOREIGN_TENSORS = (
    (re.compile(r".*\.lora_[ab]"), _MLX),
    (re.compile(r"lora_(?:unet|te[0-9]?|transformer)_.*|.*\.lora_(?:down|up)\..*"), _KOHYA),
    (
        re.compile(
            r"(?:unet|text_encoder(?:_[0-9])?|transformer\.(?:single_)?transformer_blocks)\..*"
        ),
        _DIFFUSERS,
    ),
)


def foreign_file_error(place: str, name: str) -> UnsupportedAdapterError:
    """Make the error for a place that has one of `FOREIGN_FILES` and no `WEIGHTS_FILE`."""
    return UnsupportedAdapterError(
        f"{place} has no {WEIGHTS_FILE}, but {name}: the format is {FOREIGN_FILES[name]}",
        stage="resolve",
    )


def mlx_config_error(what: str) -> UnsupportedAdapterError:
    """Make the error for a config of MLX."""
    return UnsupportedAdapterError(f"{what} has 'lora_parameters': the format is {_MLX}")


def matrix_error(name: str, shape: Sequence[int]) -> AdapterFormatError | UnsupportedAdapterError:
    """Make the error for an A or B that is not a matrix."""
    what = f"tensor {shorten(name, 200)!r} has shape {list(shape)}"
    if len(shape) <= 2 or 0 in shape:
        return AdapterFormatError(f"{what}, not two positive dimensions; save the adapter again")
    kind = "a convolution" if len(shape) > 3 else "experts in one tensor, or a convolution"
    return UnsupportedAdapterError(
        f"{what}: it belongs to {kind}, which is not applied; train linear modules only, or merge"
        " the adapter into its base model"
    )


WEIGHT_DTYPES = ("F32", "F16", "BF16")
"""The supported dtypes of adapter weights, as safetensors spells them."""

PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class TensorName:
    """The module path and role in a tensor's name.

    `embedding` says whether the module is an embedding; None if the name does not tell. `depth` is
    the number of the module's parameters that PEFT has wrapped around this one.
    """

    module: str
    part: TensorRole
    embedding: bool | None = False
    depth: int = 0


# Other markers in PEFT's names, with the features that write them.
_MARKERS = {
    "base_layer.bias": "bias (a trained bias of the base)",
    "base_layer": "a layer around another",
    "trainable_tokens_delta": "trainable_token_indices",
    "modules_to_save": "modules_to_save",
    "lora_diag": "KaSA",
    "lora_velora_embed": "VeLoRA",
    "lora_monteclora_sampler": "MonteCLoRA",
}
_NAMED = r"\.(?!weight$|bias$)[^.]+"  # the adapter's name, which PEFT strips
_RAW = re.compile(
    rf".*\.lora_(?:[AB]{_NAMED}\.(?:weight|bias)|embedding_[AB]{_NAMED}|magnitude_vector{_NAMED}\.weight)"
)
_INNER = ".base_layer"
_FULL_WEIGHT = ".base_layer.weight"

# One spelling per module: ASCII components, numbers without leading zeros.
_PATH = re.compile(r"[0-9A-Za-z_-]+(?:\.[0-9A-Za-z_-]+)*")
_PADDED = re.compile(r"\.0[0-9]+(?![^.])")
_NUMBER = re.compile(r"\.([0-9]+)(?![^.])")
_MAX_DIGITS = 6  # more than the limit of tensors in a file

MAX_PATTERN_CHARACTERS = 512
"""The limit of a key of rank_pattern or alpha_pattern."""

MAX_TARGET_CHARACTERS = 4_096
"""The limit of target_modules, exclude_modules and layers_pattern; some trainers list all names."""

_PLAIN = re.compile(r"[0-9A-Za-z_.-]*")
# The syntax on which re and re2 agree for ASCII paths. Elsewhere one refuses (\Z, \z, look-around,
# flags), or both accept and differ: {,3}, {01} and [[:alpha:]] have other meanings in re2.
# Possessive: "[]a]" can be read in two ways, and many of them, before a syntax error, in 2**n.
_SHARED_SYNTAX = re.compile(
    r"""(?: [^\\(\[{]
          | \\(?: [^0-9A-Za-z] | [AbBdDwWsS] )
          | \( (?: (?!\?) | \?: | \?P<[A-Za-z_][0-9A-Za-z_]*> )
          | \{ (?:0|[1-9][0-9]*) (?: , (?:0|[1-9][0-9]*)? )? \}
          | \[ \^?+ \]?+ (?: [^\\\[\]] | \\ (?: [^0-9A-Za-z] | [dDwWsS] ) )*+ \]
        )*+""",
    re.VERBOSE,
)
# Errors of re2 for patterns that Python's re refuses too; both parse from left to right.
_SYNTAX_ERRORS = (
    b"missing )",
    b"missing ]",
    b"unexpected )",
    b"no argument for repetition operator",
    b"invalid character class range",
)
_OPTIONS = re2.Options()
_OPTIONS.log_errors = False  # re2 would log to stderr
_OPTIONS.never_capture = True
_OPTIONS.max_mem = 1 << 18  # bytes, for the program and the states of a match
_CAPTURING = re2.Options()
_CAPTURING.log_errors, _CAPTURING.max_mem = _OPTIONS.log_errors, _OPTIONS.max_mem


def parse_tensor_name(name: str) -> TensorName:
    """Split a tensor name of an adapter file.

    Raise `UnsupportedAdapterError` for a tensor of an unsupported feature, or unknown to PEFT;
    `AdapterFormatError` for a module path that is malformed or not in canonical form.
    """
    path, _, last = name.rpartition(".")
    owner, _, factor = path.rpartition(".")
    kind = SUFFIXES.get(f"{factor}.{last}")
    if kind is not None:
        path = owner
    elif last not in {"weight", "bias"} or not factor.startswith("lora_"):
        kind = SUFFIXES.get(last)
    if kind is None or not path.startswith(PREFIX):
        raise _refusal(name)
    module, depth = path[len(PREFIX) :], 0
    while module.endswith(_INNER) and (inner := SUFFIXES.get(f"base_layer.{factor}.{last}")):
        module, kind, depth = module.removesuffix(_INNER), inner, depth + 1
    if kind.role is TensorRole.BASE_COPY and module.rpartition(".")[2] not in _TIED:
        raise _refusal(name)
    if not _PATH.fullmatch(module) or _PADDED.search(name, len(PREFIX) - 1):
        raise _malformed_error(module)
    if ("base_layer" in module or "lora_" in module or "_save" in module) and _feature(module):
        raise _refusal(name)
    if kind.role in WHOLE and ".lora_" in f".{module}":
        raise _refusal(name)
    return TensorName(module, kind.role, kind.embedding, depth)


def brings_tokens(tensors: Iterable[str]) -> bool:
    """Return whether tensors of these names may go with a tokenizer other than the base's.

    They are rows of an embedding or a head: whole, as a resized vocabulary has them, or trained.
    """
    for name in tensors:
        path, _, last = name.rpartition(".")
        module = path.removesuffix(".base_layer").removesuffix(".token_adapter")
        is_rows = last in {"trainable_tokens_delta", "weight"}
        if is_rows and module.rpartition(".")[2] in HEADS | TOKENS:
            return True
    return False


def layer_index(module: str) -> int | None:
    """Return the layer of a module path: its first numeric component, or None.

    `model.layers.12.self_attn.q_proj` is in layer 12, `lm_head` in none. Raise `AdapterFormatError`
    if the number is not a plain decimal, or has more than six digits.
    """
    found = _NUMBER.search(f".{module}")
    if found is None:
        return None
    digits = found[1]
    if len(digits) > _MAX_DIGITS or (digits[0] == "0" and digits != "0"):
        raise _malformed_error(module)
    return int(digits)


def compile_pattern(text: str) -> tuple[Matcher, int]:
    r"""Compile a key of rank_pattern or alpha_pattern. Return a matcher and its program size.

    The matcher agrees with PEFT's `re.match(rf"(.*\.)?({text})$", module)` on module paths (ASCII,
    without line breaks, before which `$` would match too), in time linear in the path. The size
    counts re2's instructions; it is 0 for a plain module name. Raise `UnsupportedAdapterError` for
    a pattern that is too large, or not in the syntax on which Python's re and re2 agree.
    """
    if len(text) > MAX_PATTERN_CHARACTERS:
        raise _unreadable(text)
    if _PLAIN.fullmatch(text):
        return _plain_matcher(text), 0
    if not _SHARED_SYNTAX.fullmatch(text):
        raise _unreadable(text)
    try:
        # Bytes, because the binding counts the characters of a str before each match.
        compiled = re2.compile(rf"(.*\.)?({text})$".encode(), _OPTIONS)
    except (re2.error, UnicodeEncodeError):
        raise _unreadable(text) from None
    search = compiled.match
    return lambda module: search(module.encode()) is not None, compiled.programsize


def compile_whole(text: str) -> tuple[Matcher, int] | None:
    """Compile a pattern of target_modules or exclude_modules. Return a matcher and its size.

    The matcher agrees with PEFT's `re.fullmatch` on module paths. Return None for a pattern of
    which `compile_pattern` would say that it is too large or has several meanings.
    """
    compiled = _compile_shared(text, _OPTIONS)
    if compiled is None:
        return None
    matches = compiled.fullmatch
    return lambda module: matches(module.encode()) is not None, compiled.programsize


def layer_pattern(text: str) -> str:
    """Return the expression that PEFT makes of an entry of layers_pattern."""
    return rf"(?:^|.*?\.){text}\.(?P<idx>\d+)\."


def compile_layer_pattern(text: str) -> tuple[Callable[[str], str | None], int] | None:
    """Compile an entry of layers_pattern. Return a function of a path, and its size.

    The function returns the layer's number as PEFT finds it: None if the pattern does not match,
    "" if it does without a number. Return None as `compile_whole` does.
    """
    compiled = _compile_shared(layer_pattern(text), _CAPTURING)
    if compiled is None or "<idx>" in text:
        return None
    number = compiled.groupindex[b"idx"]

    def number_of(module: str) -> str | None:
        found = compiled.match(module.encode())
        return None if found is None else (found.group(number) or b"").decode()

    return number_of, compiled.programsize


def _compile_shared(text: str, options: Any) -> Any:
    """Return re2's pattern; None if it is too large, or if re reads it differently."""
    if len(text) > MAX_TARGET_CHARACTERS or not _SHARED_SYNTAX.fullmatch(text):
        return None
    try:
        return re2.compile(text.encode(), options)
    except (re2.error, UnicodeEncodeError):
        return None


def pattern_error(text: str) -> str | None:
    """Return why Python's re, and so PEFT, cannot compile a pattern, in re2's words.

    None if re can, or if only re could tell: untrusted patterns are never passed to it.
    """
    if len(text) > MAX_PATTERN_CHARACTERS or "[:" in text:  # a POSIX class, to re2 only
        return None
    try:
        re2.compile(text.encode(), _OPTIONS)
    except UnicodeEncodeError:
        return None
    except re2.error as error:
        reason = bytes(error.args[0])
        return reason.decode(errors="replace") if reason.startswith(_SYNTAX_ERRORS) else None
    return None


def _plain_matcher(text: str) -> Matcher:
    """Return a matcher for a text whose only operator is the dot, for any one character."""
    length = len(text)
    tail = text.rpartition(".")[2]

    def matches(module: str) -> bool:
        if not module.endswith(tail):  # the most frequent case: modules differ at the end
            return False
        at = len(module) - length
        if at < 0 or (at and module[at - 1] != "."):
            return False
        if module.endswith(text):
            return True
        # Compared only here: a config may hold thousands of patterns with many dots.
        return all(own in (".", there) for own, there in zip(text, module[at:], strict=True))

    return matches


def _unreadable(text: str) -> UnsupportedAdapterError:
    return UnsupportedAdapterError(
        f"pattern {shorten(text, 100)!r} is too large, or not a regular expression with one"
        " meaning that can be matched in linear time; write module names instead"
    )


def _refusal(name: str) -> AdapterError:
    shown = repr(shorten(name, 200))
    path = name.removeprefix(PREFIX)
    if path == name:
        foreign = (form for pattern, form in _FOREIGN_TENSORS if pattern.fullmatch(name))
        if form := next(foreign, None):
            return UnsupportedAdapterError(f"tensor {shown}: the format is {form}")
        return UnsupportedAdapterError(
            f"tensor {shown} is not from a PEFT LoRA adapter (no {PREFIX!r} in front) and"
            " would not be applied; convert the adapter to PEFT's format"
        )
    if path.endswith(_FULL_WEIGHT):
        module = path.removesuffix(_FULL_WEIGHT)
        return UnsupportedAdapterError(
            f"tensor {shown} is a full copy of {shorten(module, 200)!r}, which PEFT saves of a"
            " module that is in target_modules and modules_to_save; train it as one of them"
        )
    if feature := _feature(path):
        return UnsupportedAdapterError(
            f"tensor {shown} belongs to {feature}, which base + scale * B @ A does not describe;"
            " train without it, or merge the adapter into its base model"
        )
    if _RAW.fullmatch(path):
        return UnsupportedAdapterError(
            f"tensor {shown} still carries its adapter's name; save the adapter with PEFT's"
            " save_pretrained, or take its tensors with get_peft_model_state_dict"
        )
    return UnsupportedAdapterError(
        f"tensor {shown} would not be applied; supported are {', '.join(SUFFIXES)}"
    )


def _feature(path: str) -> str | None:
    dotted = f".{path}."
    for marker, feature in _MARKERS.items():
        if f".{marker}." in dotted:
            return feature
    return None


def _malformed_error(module: str) -> AdapterFormatError:
    return AdapterFormatError(
        f"module path {shorten(module, 200)!r} is malformed; PEFT writes ASCII names joined by"
        " dots, with layer numbers in plain decimals"
    )


# -- targets ---------------------------------------------------------------------------------------

HEADS = frozenset({"lm_head", "embed_out"})
"""The last names of the modules that compute logits, in transformers."""

TOKENS = frozenset({"embed_tokens", "wte", "word_embeddings", "embed_in"})
"""The last names of the embeddings of tokens, in transformers."""

_TIED = frozenset({"embed_tokens", "lm_head"})
_MANY_NAMES = 20  # PEFT replaces this many names, or more, by the ends that they have in common


def is_all_linear(targets: ModuleNames) -> bool:
    """Return whether `target_modules` is the word for all linear modules but the output head."""
    return isinstance(targets, str) and targets.lower() == "all-linear"


def targeting_of(spec: AdapterSpec) -> Targeting:
    """Return the modules that a config targets, compiled once for equal fields."""
    return _compile(
        spec.targets,
        spec.excluded,
        spec.layers,
        spec.layer_patterns,
        spec.ensure_weight_tying,
        spec.saved,
        spec.parameters,
    )


def is_saved(path: str, saved: Iterable[str], *, whole_names: bool = False) -> bool:
    """Return whether `modules_to_save` names a module, or one around it.

    PEFT replaces modules whose paths end with a name. It excludes from `target_modules` only those
    that end with `whole_names`, from a dot on.
    """
    ends = [f".{name}" for name in saved] if whole_names else list(saved)
    while path:
        if f".{path}".endswith(tuple(ends)):
            return True
        path = path.rpartition(".")[0]
    return False


class Targeting:
    """The modules that a config targets.

    A pattern that cannot be matched in linear time with the meaning that it has for PEFT targets
    every module, and excludes none. So does `target_modules` null, for which PEFT has a table by
    the base's type. `cost` is the number of matching steps per character of a path.
    """

    def __init__(
        self,
        targets: ModuleNames,
        excluded: ModuleNames,
        layers: tuple[int, ...],
        layer_patterns: tuple[str, ...],
        tied: bool,
        saved: tuple[str, ...] = (),
        parameters: tuple[str, ...] = (),
    ) -> None:
        self._saved = saved
        self._weights = tuple([f".{name}" for name in parameters if name.endswith("weight")])
        self._all_linear = is_all_linear(targets)
        self._named, cost = _compile_names(None if self._all_linear else targets)
        if targets == ():  # beside target_parameters
            self._named = lambda _: False
        self._excluded, more = _compile_names(excluded)
        few = isinstance(targets, tuple) and len(targets) < _MANY_NAMES
        self._paths = frozenset(targets if few and targets is not None else ())
        self._layers = frozenset(layers)
        self._layer_of, most = _compile_layer_of(layer_patterns)
        self._ties = tied and self._names_embedding(targets)
        self.cost = cost + more + most

    def _names_embedding(self, targets: ModuleNames) -> bool:
        if isinstance(targets, tuple):
            return any(name.rpartition(".")[2] in _TIED for name in targets)
        return self._named is not None and any(map(self._named, _TIED))

    def omitted_by(self, path: str, *, embedding: bool = False) -> str | None:
        """Return the field of the config by which PEFT leaves a module out; None if it does not."""
        if self._weights and self.names_weight(path):
            return None
        tied = self._ties and layer_index(path) is None
        if tied and not embedding:  # gets the adapter of the embedding
            return None
        if self._saved and is_saved(path, self._saved, whole_names=True):
            return "modules_to_save"
        if self._excluded is not None and self._excluded(path):
            return "exclude_modules"
        if tied:
            return None
        if self._all_linear:
            head = path.rpartition(".")[2] in HEADS
            return "target_modules" if embedding or head else None
        if self._named is not None and not self._named(path):
            return "target_modules"
        # PEFT limits names, and neither a pattern nor a whole path.
        if self._layers and self._layer_of is not None and path not in self._paths:
            return None if self._layer_of(path) in self._layers else "layers_to_transform"
        return None

    def names_weight(self, path: str) -> bool:
        """Return whether target_parameters names the weight of a module."""
        return f".{path}.weight".endswith(self._weights)


_compile = lru_cache(maxsize=64)(Targeting)


def _compile_names(names: ModuleNames) -> tuple[Matcher | None, int]:
    """Return a matcher and its cost; None if there are no names, or an unreadable pattern."""
    if not names:
        return None, 0
    if isinstance(names, str):
        return compile_whole(names) or (None, 0)
    wanted = frozenset(names)
    dotted = any("." in name for name in wanted)

    def matches(path: str) -> bool:
        if path.rpartition(".")[2] in wanted:
            return True
        return dotted and not wanted.isdisjoint(_ends(path))

    return matches, 1


def _ends(path: str) -> Iterator[str]:
    """Yield the path, and each end of it that begins after a dot."""
    while path:
        yield path
        path = path.partition(".")[2]


def _compile_layer_of(patterns: Iterable[str]) -> tuple[Callable[[str], int | None] | None, int]:
    """Return a function of a path to its layer, and its cost; None for an unreadable pattern."""
    compiled = [compile_layer_pattern(text) for text in patterns]
    readable = [found for found in compiled if found is not None]
    if len(readable) < len(compiled):
        return None, 0
    if not readable:
        return _first_number, 1

    def layer_of(path: str) -> int | None:
        found = (number_of(path) for number_of, _ in readable)
        number = next((number for number in found if number is not None), "")
        return int(number) if number else None

    return layer_of, sum(cost for _, cost in readable)


def _first_number(path: str) -> int | None:
    """Return the first number that follows two components and precedes one."""
    return next((int(part) for part in path.split(".")[2:-1] if part.isdecimal()), None)
