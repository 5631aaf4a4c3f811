"""Adapters that lie elsewhere: who has them, and how their bytes come here."""
