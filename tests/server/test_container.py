"""The files for containers: what they would start runs here, without Docker, and works together."""

import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from tools import tool
from web_servers import free_port, running

from lorax_async.cli.serve import ADMIN_TOKEN, API_KEY

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "examples" / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
KEY = "a-key"


def instruction(name: str) -> list[str]:
    """The words of an instruction; of two, the first: HEALTHCHECK's CMD."""
    found = re.search(rf"^ *{name} (\[.*\])$", DOCKERFILE, re.MULTILINE)
    assert found is not None
    words: list[str] = json.loads(found[1])
    return words


def compose() -> Any:
    yaml: Any = import_module("yaml")
    return yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]


def nginx(folder: Path, port: int) -> list[str | Path]:
    """nginx as its image runs it: with the server of our file, and the volumes of the compose file."""
    mounts = dict(reversed(volume.split(":")[:2]) for volume in compose()["adapters"]["volumes"])
    config = (DOCKER / mounts["/etc/nginx/conf.d/default.conf"]).read_text()
    files = (DOCKER / mounts["/srv/adapters"]).resolve()
    config = config.replace("listen 80;", f"listen 127.0.0.1:{port};")
    (folder / "default.conf").write_text(config.replace("/srv/adapters", str(files)))
    temporary = ["client_body", "fastcgi", "proxy", "scgi", "uwsgi"]
    paths = " ".join(f"{name}_temp_path {folder}/{name};" for name in temporary)
    http = f"http {{ access_log {folder}/access; {paths} include {folder}/default.conf; }}"
    user = "user root;" if os.geteuid() == 0 else ""
    main = f"{user} daemon off; pid {folder}/pid; events {{}} {http}"
    (folder / "nginx.conf").write_text(main)
    program = tool("nginx")
    assert program is not None
    return [program, "-p", folder, "-c", folder / "nginx.conf", "-e", folder / "errors"]


def ask(url: str, body: object, key: str) -> Any:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


@pytest.mark.slow
@pytest.mark.needs("nginx")
def test_the_compose_file_s_server_takes_adapters_from_its_nginx(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin, port = free_port(), free_port()
    server = compose()["server"]
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    monkeypatch.setenv(API_KEY, KEY)
    assert {API_KEY, ADMIN_TOKEN} == server["environment"].keys()
    words = [*instruction("ENTRYPOINT"), *server["command"], "--port", str(port)]
    words += ["--cache-dir", str(tmp_path / "cache")]
    there = f"http://127.0.0.1:{origin}/"
    command = [word.replace("http://adapters/", there) for word in words]
    proxy = nginx(tmp_path, origin)
    subprocess.run([*proxy, "-t"], check=True)
    with (
        running(proxy, [origin], tmp_path / "nginx.log"),
        running(command, [port], tmp_path / "log"),
    ):
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        body = {"messages": [{"role": "user", "content": "What is ice?"}], "max_tokens": 8}
        arr, loud = (
            ask(url, body | {"model": model, "temperature": 0}, KEY)
            for model in ("pirate", f"{there}shout/")
        )
        assert arr["choices"][0]["message"]["content"].startswith("Arr")
        assert loud["choices"][0]["message"]["content"].isupper()
        with pytest.raises(urllib.error.HTTPError, match="401"):
            ask(url, body | {"model": "pirate"}, "another")
        health = [word.replace("8000", str(port)) for word in instruction("CMD")]
        assert subprocess.run(health, check=False).returncode == 0
    assert subprocess.run(health, check=False, capture_output=True).returncode == 1
    assert "GET /shout/adapter_model.safetensors" in (tmp_path / "access").read_text()
