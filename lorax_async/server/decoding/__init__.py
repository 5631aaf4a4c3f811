"""A batch of sequences, from keys and values to the next tokens."""
