"""An OpenAI-compatible server whose requests name adapters.

`app` has the routes, `serving` the uvicorn server around them, `service` the parts that all
requests share. A completion goes from `clients` (the body) through `requests` (its form and token
ids) and `completions` (the endpoint and its answer) to `engine`, which batches generations for a
`decoder`.
"""
