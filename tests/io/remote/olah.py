"""olah, a mirror of hubs that nobody here wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hub_stand_in import HubStandIn

import servers
from tools import tool


@contextmanager
def olah(folder: Path, hub: HubStandIn) -> Iterator[str]:
    """The endpoint of a mirror of that hub.

    All is said in its file: what is given on the command line does not count beside one.
    """
    program = tool("olah-cli")
    assert program is not None
    port = servers.free_port()
    own = f"127.0.0.1:{port}"
    basic: dict[str, object] = {
        "host": "127.0.0.1",
        "port": port,
        "repos-path": str(folder / "repos"),
        "hf-scheme": "http",
        "hf-netloc": hub.netloc,
        "hf-lfs-netloc": hub.store_netloc,
        "mirror-scheme": "http",
        "mirror-netloc": own,
        "mirror-lfs-netloc": own,
        "mirrors-path": [],
    }
    settings = folder / "olah.toml"
    lines = [f"{name} = {json.dumps(value)}" for name, value in basic.items()]
    settings.write_text("\n".join(["[basic]", *lines, ""]))
    command: servers.Command = [program, "--config", settings, "--log-path", folder / "logs"]
    with servers.running(command, [port], folder / "log"):
        yield f"http://{own}"
