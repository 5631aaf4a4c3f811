"""The disk cache: one plain PEFT folder per adapter, shared by processes.

An entry is published whole, by fsync and one rename, and never changes. A download writes to a
partial folder of its own, records which chunks are there, and is resumed by the next download.
Leases and downloads are locks that the kernel drops when a process dies. `base` is the interface,
`disk_cache` its implementation.
"""
