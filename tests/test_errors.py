"""The errors: their family, their copies, and what their texts must not hold."""

import copy
import inspect
import pickle
import re
import traceback
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import tiny
from tiny_loaders import loader

import lorax_async
from lorax_async import (
    AdapterLoader,
    AdapterScheduler,
    AdapterStore,
    Allow,
    Limits,
    LoaderConfig,
    errors,
    layouts,
    parse_adapter_id,
)
from lorax_async.engines.transformers import attach
from lorax_async.errors import FetchError, IntegrityError, LoraxError, class_name, shorten
from lorax_async.formats.peft_config import parse_config
from lorax_async.http.failures import FileChangedError
from lorax_async.remote.base import AnotherVersionError
from lorax_async.types import AdapterKey, AdapterRef, as_ref

RETRYABLE = {
    *("AdapterTimeoutError", "FetchError", "FetchTimeoutError", "EvictedError", "IntegrityError"),
    "SavedDuringLoadError",
    *("TransferError", "CapacityError", "AdapterInUseError"),
}
ALL: list[type[LoraxError]] = [
    kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, LoraxError)
]
each = pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
KEY = AdapterKey("somewhere", ())
SECRET = "hf_abcdefghijklmnop"


def test_the_family_can_be_imported_and_is_explained() -> None:
    for kind in ALL:
        assert getattr(lorax_async, kind.__name__) is kind
        assert kind.__name__ in lorax_async.__all__
        assert kind.__doc__
        assert kind("x").retryable == (kind.__name__ in RETRYABLE)
        assert kind("x", retryable=True).retryable
        assert not kind("x", retryable=False).retryable
        assert issubclass(kind, TimeoutError) == ("Timeout" in kind.__name__)


def test_an_internal_class_goes_by_the_name_of_its_public_one() -> None:
    assert class_name(FileChangedError("x")) == class_name(IntegrityError("x")) == "IntegrityError"
    assert class_name(AnotherVersionError("x")) == "AdapterNotFoundError"
    assert class_name(ZeroDivisionError()) == "ZeroDivisionError"


def test_a_text_says_where_and_what() -> None:
    assert str(LoraxError("it broke", id="a")) == "adapter 'a': it broke"
    assert str(LoraxError("it broke", stage="copy")) == "stage copy: it broke"
    assert str(FetchError("it broke", id="a")) == "adapter 'a', stage fetch: it broke"


def test_other_names_are_no_attributes() -> None:
    """For mypy neither: the comments would be unused."""
    with pytest.raises(AttributeError):
        lorax_async.AdapterLoade  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(ImportError):
        from lorax_async import Adaptr  # type: ignore[attr-defined]  # noqa: F401
    names = dir(lorax_async)
    assert len(names) == len({*names})
    assert {*lorax_async.__all__} < {*names}


@each
def test_a_located_copy_knows_all(kind: type[LoraxError]) -> None:
    original = kind("it broke", retryable=True, retry_after=2.5)
    original.__cause__ = cause = OSError("below")
    located = original.located(id="a", key=KEY, attempt=3, stage="ready", story=("s",))
    assert type(located) is kind
    assert (located.id, located.key, located.attempt, located.story) == ("a", KEY, 3, ("s",))
    assert (located.problem, located.retryable, located.retry_after) == ("it broke", True, 2.5)
    assert located.stage == "ready"
    assert located.__cause__ is cause
    assert (original.id, original.key, original.attempt, original.story) == (None, None, 0, ())
    again = located.located(id="b")
    assert (again.id, again.key, again.attempt, again.story) == ("b", KEY, 3, ("s",))
    assert located.located(attempt=0).attempt == 0
    # Who hears of it later can only say where there is nothing but the class's usual stage.
    assert kind("x").located(id="a").stage == kind.default_stage
    assert kind("x").located(stage="ready").located(stage="queue").stage == "ready"
    assert kind("x", stage="verify").located(stage="ready").stage == "verify"


def test_each_copy_collects_its_own_frames() -> None:
    original = IntegrityError("it broke")
    depths = []
    for _ in range(3):
        with pytest.raises(IntegrityError) as caught:
            raise original.located() from original.__cause__
        depths.append(len(traceback.extract_tb(caught.value.__traceback__)))
    assert depths == [1, 1, 1]
    assert original.__traceback__ is None


@each
def test_errors_travel_between_processes(kind: type[LoraxError]) -> None:
    error = kind("it broke", id="a", key=KEY, attempt=2, stage="copy", retryable=True, story=("s",))
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(twin) is kind
        assert vars(twin) == vars(error)
        assert str(twin) == str(error)


@pytest.mark.parametrize("size", [999, 1001, 100_000])
def test_texts_are_short(size: int) -> None:
    error = errors.AdapterFormatError("x" * size, id="y" * size, stage="verify")
    for each in (error, error.located(id="z" * size)):
        assert max(len(str(each)), len(each.problem), len(each.args[0])) <= 1000
        assert sum(map(len, traceback.format_exception_only(each))) <= 1100
    assert str(error).startswith("adapter 'yyy")
    assert shorten("x" * size) == ("x" * size if size < 1000 else "x" * 999 + "…")


@pytest.mark.parametrize("sign", ["\n", "\r", "\0", "\x1b", "\u2028", "\u202e", "\udc80", "\x85"])
def test_texts_are_one_printable_line(sign: str) -> None:
    """Names come from files: no line of a log is forged, no terminal driven, no encoding broken."""
    error = errors.AdapterFormatError(f"tensor 'a{sign}b'", id=f"c{sign}d")
    assert sign not in str(error) + error.problem + error.args[0]
    str(error).encode()
    assert "a\ufffdb" in str(error)
    assert "c\ufffdd" in str(error)


def test_a_token_is_in_no_text() -> None:
    ref = AdapterRef("org/name", source="hub", revision="main", token=SECRET)
    assert repr(ref) == (
        "AdapterRef(id='org/name', source='hub', revision='main', digest=None, allow_stale=False)"
    )
    for text in (str(ref), f"{ref}", f"{ref!r}", "{}".format(ref), repr([ref]), ref.text):  # noqa: UP032
        assert SECRET not in text
    assert ref != AdapterRef("org/name", source="hub", revision="main", token="other")
    assert as_ref("org/name", "hub", "main", SECRET) == ref
    with pytest.raises(errors.UsageError) as caught:
        as_ref(ref, token=SECRET)
    assert SECRET not in repr(caught.value) + str(caught.value)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def untyped(value: Any) -> Any:
    """For arguments of wrong types."""
    return value


@pytest.mark.usefixtures("nothing_left")
async def test_a_wrong_argument_is_named(tmp_path: Path) -> None:
    """As people make them: a mix-up of two calls, of two arguments, an unset variable."""
    layout: Any = tiny.layout()
    (tmp_path / "config.json").write_text('{"model_type": "a\\nb"}')
    async with loader() as there, AdapterScheduler(there) as scheduler:
        calls: tuple[tuple[Callable[[], object], str], ...] = (
            (lambda: AdapterLoader(layout, device=untyped("cuda")), r"use LoaderConfig\(device="),
            (lambda: AdapterLoader(layout, source=untyped("hub")), "name sources in ids"),
            (lambda: AdapterStore(untyped({"cache_bytes": 5})), r"config must be StoreConfig\(…\)"),
            (
                lambda: LoaderConfig(local_roots=untyped("loras")),
                r"as \('adapters',\), not 'loras'",
            ),
            (lambda: LoaderConfig(eviction=untyped("LRU")), "one of lru, lfu, gdsf, not 'LRU'"),
            (lambda: layouts.from_module(untyped("smollm2")), "not 'smollm2'; .*from_pretrained"),
            (lambda: layouts.from_module(untyped(None)), "the model is an nn.Module, not None"),
            (lambda: layouts.from_pretrained(""), "a folder or a hub id, not ''"),
            (lambda: layouts.from_pretrained(tmp_path), r"cannot build the model of [^\ufffd]*$"),
            (lambda: layouts.from_adapter(""), "an adapter's folder is a path, not ''"),
            (lambda: layouts.from_adapter(tmp_path / "x"), "adapter '/.*/x'.* no file '/.*/x/ad"),
            (lambda: attach(untyped(there), untyped(None)), "not AdapterLoader and NoneType"),
            (lambda: AdapterScheduler(untyped(None)), "takes an AdapterLoader, not None"),
            (lambda: scheduler.submit(untyped("a")), "submit takes a Request, not 'a'"),
            (lambda: there.prefetch(untyped(5)), "an adapter id, or several, not 5"),
            (lambda: there.subscribe(untyped(None)), "a function of one event, not None"),
            (lambda: parse_config(LFS, Limits()), "it is a Git LFS pointer.*`git lfs pull`"),
            *(
                (
                    partial(parse_adapter_id, f"https://{page}"),
                    "page of the hub; the id is 'org/name'",
                )
                for page in ("huggingface.co/org/name", "hf.co/org/name/tree/main/")
            ),
        )
        for number, (call, said) in enumerate(calls):
            with pytest.raises(LoraxError) as caught:
                call()
            assert re.search(said, str(caught.value)), (number, str(caught.value))
    files = "https://huggingface.co/org/name/resolve/main/"
    assert parse_adapter_id(files, (Allow("https", "huggingface.co"),)).id == files


def test_a_reference_or_a_key_says_everything_itself() -> None:
    extras: list[dict[str, Any]] = [
        *({"source": "hub"}, {"revision": "x"}, {"token": "x"}, {"digest": "a" * 64}),
        {"allow_stale": True},
    ]
    for given, extra in product((AdapterRef("a"), KEY), extras):
        assert as_ref(given) is given
        with pytest.raises(errors.UsageError, match="has source, revision, token, digest and"):
            as_ref(given, **extra)
    no_ids: list[Any] = [None, 5, b"org/name", ["a"], ...]
    for given in no_ids:
        with pytest.raises(errors.UsageError, match=r"a str or a pathlib\.Path, not"):
            as_ref(given)
    assert as_ref(Path("a")) == AdapterRef(Path("a"))
    assert as_ref("a") != AdapterRef(Path("a")), "a string may be a stranger's, a Path is not"
