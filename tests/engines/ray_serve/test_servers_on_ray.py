"""Our own server on Ray Serve."""

from itertools import takewhile
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import torch
from peft_adapters import active, save
from scraping import of, parsed
from server_world import llama_config, tokenizer
from transformers import LlamaForCausalLM

from lorax_async.config import LoaderConfig

pytestmark = [pytest.mark.timeout(1800), pytest.mark.filterwarnings("ignore")]  # Ray's own

JSON = {"Content-Type": "application/json"}
PROMPT, TOKENS = "once upon", 40
PEFT = {"r": 8, "lora_alpha": 64}


@pytest.mark.parametrize("client", [""], indirect=True)
def test_openais_client_gets_pefts_text_from_replicas(
    client: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    import openai
    from ray import serve

    from lorax_async.server.ray_serve import build_app

    torch.manual_seed(2)  # its texts are long, and differ
    model: Any = LlamaForCausalLM(llama_config())
    model.eval()
    model.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    loras = {"one": ["q_proj", "v_proj", "o_proj"], "two": ["up_proj", "down_proj"]}
    folders = {
        name: save(model, PEFT | {"target_modules": targets}, tmp_path / name, seed=len(targets))
        for name, targets in loras.items()
    }
    expected = {"b": _generate(model)}
    for name, folder in folders.items():
        with active(model, **{name: folder}) as peft_model:
            expected[name] = _generate(peft_model)
    config = LoaderConfig(dtype="float32", device_bytes=1 << 20, max_slots=3)
    app = build_app(
        tmp_path / "base",
        config,
        {"base": "b", "adapters": folders},
        num_replicas=2,
        ray_actor_options={"num_cpus": 0},
    )
    serve.run(app, name="server", route_prefix="/")
    request.addfinalizer(lambda: serve.delete("server"))  # others have this prefix, too
    assert len({text[:16] for text in expected.values()}) == 3
    asked: dict[str, Any] = {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
    for name, text in [*expected.items()] * 2:
        answered = client.completions.create(model=name, **asked).choices[0].text
        # A character that the last tokens begin, and do not end, is not sent.
        assert text.startswith(answered)
        assert len(text) - len(answered) < 8 < 20 < len(answered)
        chunks = client.completions.create(model=name, stream=True, **asked)
        assert "".join(chunk.choices[0].text for chunk in chunks) == answered
    with urlopen(str(client.base_url).removesuffix("v1/") + "metrics", timeout=60) as answer:
        samples = parsed(answer.read().decode())
    tokens = of(samples, "lorax_server_prompt_tokens_total")
    assert len(tokens) == 2, "each replica has its own"
    assert sum(tokens.values()) == 4 * len(expected) * len(tokenizer()(PROMPT)["input_ids"])
    assert {model.id for model in client.models.list()} == {"b", "one", "two"}
    url = f"{client.base_url}completions"
    with pytest.raises(HTTPError, match="400") as refusal:  # not silence: no router reads the name
        urlopen(Request(url, b'{"model": "\\ud800", "prompt": "x"}', JSON), timeout=60)
    refusal.value.close()
    with pytest.raises(openai.APIStatusError) as refused:
        client.completions.create(model="org/other", **asked)
    assert refused.value.status_code == 404
    with pytest.raises(openai.APIStatusError) as refused:
        client.completions.create(model="b", prompt="x" * (1 << 21))
    assert refused.value.status_code == 413


def _generate(model: Any) -> str:
    prompt = torch.tensor([tokenizer()(PROMPT)["input_ids"]])
    new = model.generate(prompt, do_sample=False, max_new_tokens=TOKENS, eos_token_id=None)
    ends = {model.generation_config.eos_token_id, tokenizer().eos_token_id}
    tokens = takewhile(lambda token: token not in ends, new[0, prompt.shape[1] :].tolist())
    text: str = tokenizer().decode(list(tokens))
    return text
