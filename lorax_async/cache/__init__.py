"""The disk cache: one plain PEFT folder per adapter, shared by processes.

An entry is published whole, by fsync and one rename, and never changes. A download writes to a
partial folder of its own, records which chunks are there, and is resumed by the next download.
Leases and downloads are locks that the kernel drops when a process dies.

- `base`: keys, records, and the interface of a cached adapter
- `disk_cache`: the implementation, and its maintenance by `lorax-async cache`
- `entries`: published entries, and which of them leave for room
- `partials`: downloads that can be resumed
- `directory`: the folder, its locks and temporary files
"""
