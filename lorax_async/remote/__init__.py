"""Remote adapters: the hub, folders behind URLs, and object stores.

A backend resolves an id to a version and locates its files; a fetch brings them by ranges into the
disk cache, readable while it runs. May import `http`, `cache`, `sources.base` and what is below.

- `remote_source`: the `Source`, and what it is made of
- `opening`: from an id to its version, and from there to the cache's entry or a new download
- `readers`: one download into the cache; readers of entries and downloads
- `base`: the interface of a backend, and the URLs that the operator allows
- `hub`: the Hugging Face hub and its standard cache
- `web`: folders behind http(s) URLs
- `object_stores`: S3, Google Cloud Storage, Azure Blob Storage
"""
