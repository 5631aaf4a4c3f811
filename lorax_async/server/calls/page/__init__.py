"""The page at / of the server, and what it is told while it is open."""
