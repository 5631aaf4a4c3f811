"""The files of an adapter: safetensors, its index, PEFT's config and names. Pure.

Everything here reads strangers' bytes: what is odd is refused by a typed error, never guessed.
"""
