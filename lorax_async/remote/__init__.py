"""Adapters that are elsewhere: the hub, web servers and object stores.

A backend resolves an id to a version and says where its files are; `opening` takes them from the
disk cache or downloads them into it by the range engine. `base` is the interface of a backend.
"""
