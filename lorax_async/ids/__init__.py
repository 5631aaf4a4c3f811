"""Adapter ids: grammar, parsing and the operator's allow list.

An id is parsed once, into an `AdapterRef` in its canonical spelling. Files:

- `grammar`: hub names, URLs of folders, prefixes in buckets;
- `allow`: `Allow`, a place from which adapters may be loaded;
- `parsing`: `parse_adapter_id`, local paths, and the check against the allow list.

It touches no file and no network.
"""
