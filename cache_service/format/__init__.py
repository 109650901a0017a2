"""What the bytes of a cache mean. No I/O, no torch."""
