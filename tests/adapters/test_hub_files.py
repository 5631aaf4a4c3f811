"""What the hub cache lacks is fetched into it: the two files, and no more than these."""

import asyncio
import errno
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import huggingface_hub
import pytest
import small_base as base
from hub_stand_in import HubStandIn, Reply
from huggingface_hub import constants, hf_hub_download

from lorax_async import errors
from lorax_async.adapters.lora import LoraConfig
from lorax_async.adapters.weights_file import WeightsFile
from lorax_async.formats.peft_names import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE

Patch = pytest.MonkeyPatch

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left")

CONFIG, WEIGHTS, INDEX = CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE
SQL, TOKEN = "org/sql", "hf_5ecre7"
REFUSALS = [(503, errors.FetchError, 7.0), (403, errors.AccessDeniedError, None)]
A = base.key(0, "q_proj", "A")


def adapter(tmp_path: Path, rank: int = 8) -> Path:
    folder = tmp_path / f"rank {rank}"
    return folder if folder.exists() else base.write(folder, base.tensors(rank), rank)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rank_of(id: str, token: str | None = None) -> int:
    with WeightsFile.open(id, token) as file:
        return file.shape(A)[0]


@pytest.fixture
def hub(hub_client: Path, monkeypatch: Patch) -> Iterator[HubStandIn]:
    with HubStandIn() as running:
        # What HF_ENDPOINT does at import.
        template = f"{running.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", running.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield running
        huggingface_hub.close_session()


def requested(hub: HubStandIn) -> set[tuple[str, str]]:
    there = [each for each in hub.asked if not hub.is_at_store(each)]
    return {(each.method, each.target.split("/")[-1]) for each in there}


def test_files_come_once(hub: HubStandIn, tmp_path: Path, capfd: Any, monkeypatch: Patch) -> None:
    commit = hub.put(SQL, contents(adapter(tmp_path)) | {"README.md": b"long"})
    assert LoraConfig.load(SQL).r == 8
    assert requested(hub) == {("HEAD", CONFIG), ("GET", CONFIG)}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    with pytest.raises(errors.FetchError, match="set to be offline") as caught:
        WeightsFile.open(SQL)
    assert (caught.value.id, caught.value.retryable) == (SQL, False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()
    with WeightsFile.open(SQL) as file:
        assert file.read(A).equal(base.tensors()[A])
    assert {name for _, name in requested(hub)} == {CONFIG, WEIGHTS}
    found = hf_hub_download(SQL, WEIGHTS, local_files_only=True)
    assert Path(found).parent.name == commit
    hub.asked.clear()
    assert rank_of(SQL) == LoraConfig.load(SQL).r == 8
    assert not hub.asked
    assert capfd.readouterr() == ("", "")


async def test_many_get_the_same_while_the_loop_goes_on(hub: HubStandIn, tmp_path: Path) -> None:
    hub.put(SQL, contents(adapter(tmp_path)))
    config = asyncio.create_task(LoraConfig.load_async(SQL))
    calls = [asyncio.create_task(WeightsFile.open_async(SQL)) for _ in range(12)]
    await asyncio.sleep(0)
    for call in calls[::3]:
        call.cancel()
    opened = await asyncio.gather(*calls, return_exceptions=True)
    for number, weights in enumerate(opened):
        if number % 3 == 0:
            assert isinstance(weights, asyncio.CancelledError)
            continue
        assert isinstance(weights, WeightsFile)
        with weights:
            assert weights.read(A).equal(base.tensors()[A])
    assert (await config).r == 8


@pytest.mark.parametrize(("revision", "cached"), [("v1", CONFIG), ("refs/pr/1", WEIGHTS)])
async def test_both_files_are_of_one_commit(
    hub: HubStandIn, tmp_path: Path, revision: str, cached: str
) -> None:
    """The branch moves after one file was fetched; another revision is another adapter."""
    hub.put(SQL, contents(adapter(tmp_path)))
    hf_hub_download(SQL, cached)
    for at in ("main", revision):
        hub.put(SQL, contents(adapter(tmp_path, 4)), at)
    assert LoraConfig.load(f"{SQL}@{revision}").r == 4
    commit = hub.repos[SQL].refs["main"]
    ranks = [rank_of(id) for id in (SQL, f"{SQL}@{commit}", f"{SQL}@{revision}")]
    assert ranks == [8, 4, 4]
    hub.asked.clear()  # and all are in the cache
    for id, rank in ((SQL, 8), (f"{SQL}@main", 8), (f"{SQL}@{revision}", 4)):
        assert (await LoraConfig.load_async(id)).r == rank_of(id) == rank
    assert not hub.asked


@pytest.mark.parametrize("cached", [False, True])
def test_an_index_in_place_of_the_weights_is_refused(
    hub: HubStandIn, tmp_path: Path, cached: bool
) -> None:
    files = contents(adapter(tmp_path))
    hub.put(SQL, {CONFIG: files[CONFIG], INDEX: b"{}"})
    if cached:
        hf_hub_download(SQL, INDEX)
    with pytest.raises(errors.UnsupportedAdapterError, match=INDEX) as caught:
        WeightsFile.open(SQL)
    assert (caught.value.id, caught.value.stage) == (SQL, "resolve")
    assert LoraConfig.load(SQL).r == 8


def test_a_private_adapter(hub: HubStandIn, tmp_path: Path, monkeypatch: Patch) -> None:
    hub.put(SQL, contents(adapter(tmp_path)), private_token=TOKEN)
    for token in (None, "hf_another"):
        with pytest.raises(errors.LoraxError) as caught:
            LoraConfig.load(SQL, token)
        assert isinstance(caught.value, errors.AccessDeniedError | errors.AdapterNotFoundError)
        assert (caught.value.id, caught.value.stage) == (SQL, "resolve")
        assert "hf_" not in str(caught.value)
    assert LoraConfig.load(SQL, TOKEN).r == 8
    monkeypatch.setenv("HF_TOKEN", TOKEN)  # this machine's own
    assert rank_of(SQL) == 8
    hub.asked.clear()
    for token in ("", "two words", "ö"):
        with pytest.raises(errors.UsageError, match="token"):
            LoraConfig.load("org/other", token)
    assert not hub.asked


@pytest.mark.parametrize(
    ("id", "without", "said"),
    [
        *[("org/other", "", "org/other"), (f"{SQL}@v2", "", "no revision 'v2'")],
        *((SQL, name, f"no {name} at 'main'") for name in (CONFIG, WEIGHTS)),
    ],
)
def test_missing_files(hub: HubStandIn, tmp_path: Path, id: str, without: str, said: str) -> None:
    hub.put(SQL, {k: v for k, v in contents(adapter(tmp_path)).items() if k != without})
    with pytest.raises(errors.LoraxError, match=said) as caught:
        WeightsFile.open(id)
    assert isinstance(caught.value, errors.AdapterNotFoundError | errors.AccessDeniedError)
    assert caught.value.id == id


def test_a_file_over_the_limit_is_not_fetched(hub: HubStandIn, hub_client: Path) -> None:
    hub.put(SQL, {CONFIG: b" " * (256 * 1024 + 1)})
    with pytest.raises(errors.AdapterFormatError, match="262,145 bytes, over the 262,144 allowed"):
        LoraConfig.load(SQL)
    assert requested(hub) == {("HEAD", CONFIG)}
    assert not list(hub_client.rglob("blobs/*"))


@pytest.mark.parametrize(("status", "kind", "after"), REFUSALS)
def test_a_hub_that_refuses(
    hub: HubStandIn, monkeypatch: Patch, status: int, kind: Any, after: float | None
) -> None:
    """As often as huggingface_hub itself asks again, which takes 40 s."""
    slept = list[float]()
    monkeypatch.setattr(time, "sleep", slept.append)
    hub.behave = lambda _: Reply(status, {"Retry-After": "7"} if after else {})
    with pytest.raises(kind) as caught:
        LoraConfig.load(SQL)
    assert (caught.value.id, caught.value.stage) == (SQL, "resolve")
    assert getattr(caught.value, "retry_after", None) == after
    assert bool(slept) == (after is not None)


def test_a_disk_that_takes_no_more(hub: HubStandIn, tmp_path: Path, monkeypatch: Patch) -> None:
    hub.put(SQL, contents(adapter(tmp_path)))
    full = Mock(side_effect=OSError(errno.ENOSPC, "No space left", "/home/somebody/.cache"))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", full)
    with pytest.raises(errors.FetchError, match=r"cannot be stored .* \(ENOSPC\)") as caught:
        LoraConfig.load(SQL)
    assert (caught.value.id, caught.value.retryable) == (SQL, False)
    assert "somebody" not in str(caught.value)
