"""Apply adapters in the batches of an inference engine.

- `transformers`: `attach` puts adapters into a Hugging Face decoder;
- `batch`: one batch of an attached model, with bias, DoRA and embeddings;
- `layer_gate`: lets a forward pass enter layer k when the batch's adapters have layer k;
- `plugin_settings`: what plug-ins share: settings, what adapters have to fit, responses to errors;
- `vllm`: the plug-in for vLLM's server;
- `sglang`: the plug-in for SGLang's server;
- `ray`: the router and replicas for Ray Serve;
- `smollm2`: the base model of demo, tests and examples.

It knows the loader, its handles and the SGMV kernels.
"""
