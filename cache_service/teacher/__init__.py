"""A name becomes a frozen network with an identity."""
