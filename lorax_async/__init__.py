"""Placeholder until the loader lands in this folder."""
