"""Sources: one interface, local folders, tensors in memory.

A source resolves an id to a key, opens the files of that key and fetches their bytes,
layer group by layer group. May import `formats`, `planning`, `files`, `ids`, `cache` and
`remote.readers`, not the runtime.

- `base`: the interface `Source`, and the router: by the location of an id, or the type of a key
- `local`: the source of local folders: finds a folder, checks, opens and hashes its files
- `pickled_weights`: converts `adapter_model.bin` to safetensors, in a process of its own
- `tensors`: the source of tensors in host memory; snapshots of tensors, their copies and budget
"""
