"""Plug-in for vLLM: adapters that requests name, without stopping the engine for them.

- `plugin`: what vLLM's entry points load: a resolver of adapter names, and the server's part;
- `interface`: the names of vLLM that all of it uses, which the start checks;
- `checked_folders`: what is left where the server lacks some of them;
- `served_adapters`: an adapter's way from its name to the engine, and out of it again;
- `engine_calls`: the calls to vLLM's engine and workers;
- `notices`: how workers tell at once what they lost;
- `worker`: builds weights beside the loop of each worker, and keeps them in host memory;
- `routes`: HTTP routes and metrics.

Settings are in `engines.plugin_settings`. vLLM is imported only by functions and modules that vLLM
itself loads. docs/vllm.md is for users.
"""
