"""Adapters in folders that nginx serves, and what its log says of them."""

from __future__ import annotations

import re
from pathlib import Path

from user_loads import contents

from servers import Nginx


def folder_of(test: str) -> str:
    """A name of its own for each test: the server is everybody's."""
    return re.sub(r"\W+", "-", test)


def put(nginx: Nginx, name: str, adapter: Path) -> None:
    for file, data in contents(adapter).items():
        nginx.put(f"{name}/{file}", data)


def first(nginx: Nginx) -> str:
    return f"127.0.0.1:{nginx.first}"


def second(nginx: Nginx) -> str:
    return f"127.0.0.1:{nginx.second}"


def lines(nginx: Nginx, name: str) -> list[str]:
    """What was asked of one folder."""
    return [line for line in nginx.requests() if f"/{name}/" in line]


def of_weights(nginx: Nginx, name: str) -> list[int]:
    """How many bytes of the weights went out, by request."""
    asked = [line for line in lines(nginx, name) if ".safetensors" in line]
    return [int(line.rpartition(" ")[2]) for line in asked]
