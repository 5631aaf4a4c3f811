"""Sources: one interface, local folders, tensors in memory, merges.

A source resolves an id to a key, opens the files of that key and brings their bytes within reach,
layer group by layer group. May import `formats`, `planning`, `files`, `ids`, `cache` and
`remote.readers`, not the runtime.

- `base`: the interface `Source`
- `router`: local or remote, by id, key or reader
- `local`: the source of local folders: finds a folder, checks, opens and hashes its files
- `split_reader`: the reader of weights in several files
- `tensors`: the source of tensors and merges, in host memory; snapshots of tensors
- `host_copies`: files in host memory, their budget, spill files
- `merges`: PEFT's arithmetic
"""
