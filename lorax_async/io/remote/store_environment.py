"""What the environment says of object stores, where obstore alone does not act on it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING
from urllib.parse import quote

from lorax_async.io.remote.store_ids import Folder, Scheme, digest_of

if TYPE_CHECKING:
    from obstore.store import AzureAccessKey

_SAS = ("AZURE_STORAGE_SAS_KEY", "AZURE_STORAGE_SAS_TOKEN")
_YES = frozenset({"1", "true", "on", "yes", "y"})

_GOOGLE = "https://storage.googleapis.com"
_PREFIX: dict[Scheme, str] = {"s3": "AWS", "gs": "GOOGLE", "az": "AZURE"}
_WHO: dict[Scheme, tuple[str, ...]] = {
    "s3": ("AWS_ACCESS_KEY_ID", "AWS_ROLE_ARN"),
    "gs": (
        *("GOOGLE_SERVICE_ACCOUNT", "GOOGLE_SERVICE_ACCOUNT_PATH"),
        *("GOOGLE_SERVICE_ACCOUNT_KEY", "GOOGLE_APPLICATION_CREDENTIALS"),
    ),
    "az": ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_CLIENT_ID", "AZURE_STORAGE_CLIENT_ID", *_SAS),
}
"""What tells one authority from another. Of a secret among them, only a digest is ever kept."""


def scope_of(scheme: Scheme) -> str:
    """On whose authority a store is asked: a digest of what names it; "" where on nobody's."""
    if _skips_signature(scheme):
        return ""
    who = [f"{name}={os.environ[name]}" for name in _WHO[scheme] if os.environ.get(name)]
    if not who:  # it is the machine's
        return "environment"
    return f"environment-{digest_of(who)}"


def unsigned_urls(folder: Folder, paths: Sequence[str]) -> list[str] | None:
    """URLs of objects, where the environment says that nothing is to be signed.

    So it does by `…_SKIP_SIGNATURE`, which obstore heeds in requests but not in signing, and for
    Azure by a SAS token, which can sign nothing but itself opens URLs. None: they are to be signed.
    """
    if _skips_signature(folder.scheme):
        return _bare_urls(folder, paths)
    sas = next((os.environ[name] for name in _SAS if os.environ.get(name)), "").lstrip("?")
    if folder.scheme == "az" and sas:
        return [f"{url}?{sas}" for url in _bare_urls(folder, paths)]
    return None


def _skips_signature(scheme: Scheme) -> bool:
    return os.environ.get(f"{_PREFIX[scheme]}_SKIP_SIGNATURE", "").lower() in _YES


def _bare_urls(folder: Folder, paths: Sequence[str]) -> list[str]:
    """As obstore makes them, without what nobody's key has signed."""
    import obstore  # noqa: PLC0415 - an extra, needed here alone
    from obstore.store import AzureStore, S3Store  # noqa: PLC0415

    if folder.scheme == "gs":
        base = os.environ.get("GOOGLE_BASE_URL", _GOOGLE).rstrip("/")
        return [f"{base}/{folder.bucket}/{quote(path)}" for path in paths]
    store = (
        S3Store(folder.bucket, config={"access_key_id": "-", "secret_access_key": "-"})
        if folder.scheme == "s3"
        else AzureStore(folder.bucket, skip_signature=False, credential_provider=_nobody)
    )
    signed = obstore.sign(store, "GET", paths, timedelta(hours=1))
    return [url.partition("?")[0] for url in signed]


def _nobody() -> AzureAccessKey:
    return {"access_key": "bm9uZQ==", "expires_at": None}
