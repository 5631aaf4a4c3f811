"""Adapters in the batches of an inference engine.

`transformers.attach` puts them into a Hugging Face decoder; `layer_gate` lets a forward pass enter
layer k when the adapters of its batch have layer k.
"""
