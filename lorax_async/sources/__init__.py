"""Where adapters come from: one interface, one router, local files, tensors in memory, merges.

`base.Source` resolves an id to a key, opens its files and brings their bytes within reach, layer
group by layer group. `router` chooses a source by the id, or by the key.
"""
