"""Parse and write the files of an adapter. All input is untrusted: refuse, never guess.

- `safetensors`: the header of a safetensors file
- `peft_config`: `adapter_config.json`
- `peft_names`: names of files and tensors; the modules that a config targets
- `tensor_kinds`: the kinds of tensors, by suffix, role and the engines that apply them
- `strict_json`: the JSON reader for all of these
- `digests`: file digests, computed or sent by a server
- `spans`: byte ranges of a file

The package is pure: bytes in, values or a typed error out. It may know `types`, `config` and
`errors`.
"""
