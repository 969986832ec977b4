"""Measurements of what layers cost on a device, in seconds and in bytes."""
