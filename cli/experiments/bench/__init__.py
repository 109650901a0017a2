"""Measurements that a user can repeat: `kd-cache bench NAME`."""
