"""The page at / of the server, and the calls it makes."""
