"""Builds as a service: a queue that survives, one worker process per device, rows on demand."""
