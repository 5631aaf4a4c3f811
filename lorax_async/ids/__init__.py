"""Which texts are adapter ids, and what they mean; asks nobody and touches no file."""
