"""Plan which bytes of an adapter go where on the device, and which rows use which slot.

- `layout`: the modules, shapes and layers of a base model
- `model_families`: what module names and configs of decoders say; layouts made from configs
- `pairing`: match an adapter's A and B tensors to the modules of a layout
- `sharding`: cut a layout and an adapter for one rank of a tensor-parallel server
- `transfer_plan`: place every tensor in an extent; the moves and staging windows that fill it
- `batch_plan`: order a batch's rows by slot and rank

The package is pure: no I/O, torch, threads or clock. It may know `formats`, the sizes that
`lifecycle` needs, `types`, `config` and `errors`.
"""
