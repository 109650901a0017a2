"""The kd-cache command."""
