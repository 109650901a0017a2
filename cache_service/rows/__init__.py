"""Reads, writes and verifies the rows of a cache, wherever its storage is. No torch."""
