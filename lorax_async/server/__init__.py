"""An OpenAI-compatible server whose requests name adapters.

`app` has the routes, `completions` the way of one request, `engine` the loop that computes batches
in a thread of its own, `setup` puts a server together, `serving` runs it on uvicorn.
"""
