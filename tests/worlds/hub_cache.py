"""The standard hub cache, made by hand as huggingface_hub lays it out."""

from hashlib import sha256
from pathlib import Path


def put(
    cache: Path, repo_id: str, files: dict[str, bytes], *, commit: str, refs: tuple[str, ...] = ()
) -> Path:
    folder = cache / f"models--{repo_id.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (folder / "blobs").mkdir(exist_ok=True)
    for name, content in files.items():
        blob = folder / "blobs" / sha256(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / name).symlink_to(f"../../blobs/{blob.name}")
    for ref in refs:
        path = folder / "refs" / ref
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(commit)
    return snapshot
