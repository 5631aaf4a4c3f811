"""Adapter ids: their grammar, what is allowed, and how they are parsed.

Nothing here touches a file or the network. An id is parsed once, into an `AdapterRef`.
"""
