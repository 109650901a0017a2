"""What the bytes of a cache mean. Pure: no I/O, no torch."""
