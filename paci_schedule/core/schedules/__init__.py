"""Schedules: pure generators of compute ops, one short file each, its grid drawn on top."""
