"""An OpenAI-compatible server whose requests name adapters (docs/server.md).

Only `cli` imports this package. Importing it needs the extra `serve`.

- `app.py`: the routes; `listen` and `serve`: the application on uvicorn, and its graceful end
- `service.py`: `Service`, the state that requests share, and `open_service`, its assembly
- `server_settings.py`: `ServerSettings`, and the check of a request's host
- `clients.py`: a client's key, body, events and limits, and the requests in flight
- `request_bodies.py`: the bodies, parsed and checked; prompts as token ids
- `model_names.py`: names for adapters, and the ids that requests may use
- `completions.py`: one request, from its body to its response
- `error_responses.py`: errors as HTTP responses
- `generation.py`: `Generation`, and the interface `Decoder` of a model
- `engine.py`: `Engine`: continuous batching and sampling, in a thread
- `transformers_decoder.py`: a `Decoder` for transformers' models, with its KV cache
- `admin.py`: the operator's endpoints; `warm_list.py`: the adapters to load at the start
- `dashboard.py`: what the page at / shows, and traces of cold requests; `page/`: its files
- `server_metrics.py`: metrics
"""
