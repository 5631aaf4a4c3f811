"""An OpenAI-compatible server whose requests name adapters (docs/server.md).

Only `cli` imports this package. Importing it needs the extra `serve`.

- `app.py`: the calls, the operator's and the page's among them, by FastAPI, and what its document
  says of them; `listen` and `serve`: the application on uvicorn, and its graceful end
- `service.py`: `Service`, the state that requests share; requests in flight; `open_service`
- `server_settings.py`: `ServerSettings`: who may call, as what, and which ids they may name
- `request_bodies.py`: the bodies, read, parsed and checked; prompts as token ids
- `adapter_tokenizers.py`: the tokenizers of adapters with a vocabulary of their own
- `answers.py`: the JSON of answers, as models
- `responses.py`: errors as HTTP responses, and event streams
- `completions.py`: one request, from its body to its response
- `engine.py`: `Engine`: continuous batching and sampling, in a thread; the interface `Decoder`
- `transformers_decoder.py`: a `Decoder` for transformers' models, with its KV cache
- `monitoring.py`: what the page shows, and traces of cold requests; `page/`: its files
- `server_metrics.py`: numbers for Prometheus
- `server_log.py`: the log's lines: requests, loads, failures, start and end
- `warm_list.py`: the adapters to load at the start
- `ray_serve.py`: the server as a deployment of Ray Serve
"""
