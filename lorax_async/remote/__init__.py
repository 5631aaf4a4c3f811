"""Remote adapters: the hub, folders behind URLs, and object stores.

A backend resolves an id to a version and locates its files; a fetch brings them by ranges into the
disk cache, readable while it runs. May import `http`, `cache`, `sources.base` and what is below.

- `remote_source`: the `Source`, its rules for URLs, the registry of backends
- `resolution`: id to version, by recent answers, the cache or the source
- `opening`: from the cache, or a new download
- `metadata`: config, index and headers, before any layer
- `readers`: one download into the cache; readers of entries and downloads
- `base`: the interface of a backend
- `hub`, `hub_calls`: the Hugging Face hub and its standard cache
- `web`: folders behind http(s) URLs
- `object_stores`: S3, Google Cloud Storage, Azure Blob Storage
"""
