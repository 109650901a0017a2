"""The `kd-cache` command."""
