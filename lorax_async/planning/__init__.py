"""What is moved where. Pure.

`layout` says what a base model offers, `pairing` matches an adapter's tensors to it, `sharding`
cuts both for one rank, `transfer_plan` places each byte, `batch_plan` orders a batch's rows.
"""
