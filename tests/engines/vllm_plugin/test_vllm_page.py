"""docs/vllm.md, followed on a laptop: what it starts answers as the page says."""

import json
import os
import re
import signal
import subprocess
import textwrap
import time
from http.client import HTTPConnection
from pathlib import Path

from web_servers import free_port

from lorax_async.engines.smollm2 import prepare_base

ROOT = Path(__file__).parents[3]
SECTION = re.compile(r"^## Try it on a laptop$(.*?)^## ", re.DOTALL | re.MULTILINE)
BLOCK = re.compile(r"(?:^ {4}.*\n)+", re.MULTILINE)


def is_ready(port: int) -> bool:
    connection = HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def content_of(command: str, env: dict[str, str]) -> str:
    """Return the content that a curl prints."""
    shown = subprocess.run(["bash", "-c", command], env=env, capture_output=True, check=True)
    content: str = json.loads(shown.stdout)["choices"][0]["message"]["content"]
    return content


def test_the_laptops_server_answers_as_the_page_says(tmp_path: Path) -> None:
    """All but the installation: `make vllm` does the same in a venv of its own."""
    found = SECTION.search((ROOT / "docs" / "vllm.md").read_text())
    assert found is not None
    install, start, ask, answer, base_answer = map(textwrap.dedent, BLOCK.findall(found[1]))
    assert install.count("pip") == 4
    port, base = free_port(), prepare_base()
    python = Path(os.environ["VLLM_PYTHON"])
    given = {name: text for name, text in os.environ.items() if "LORAX" not in name}
    given |= {
        "PATH": f"{python.parent}:{given['PATH']}",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        "XDG_CACHE_HOME": str(tmp_path),
        "base": str(base),
        "VLLM_NO_USAGE_STATS": "1",
    }
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            ["bash", "-c", f"{start.rstrip()} --port {port}"],
            cwd=ROOT,
            env=given,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        stop = time.monotonic() + 400
        while not is_ready(port):
            assert server.poll() is None, (tmp_path / "log").read_text()[-4000:]
            assert time.monotonic() < stop, "vLLM did not start"
            time.sleep(0.5)
        asked = ask.replace("localhost:8000", f"127.0.0.1:{port}")
        assert content_of(asked, given) == answer.strip()
        # The base's words come near to a tie, which another CPU may decide in another way.
        of_base = content_of(asked.replace('"model": "pirate"', '"model": "smollm2"'), given)
        assert of_base.split()[:2] == base_answer.split()[:2]
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
