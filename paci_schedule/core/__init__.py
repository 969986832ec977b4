"""The core: what schedules are, in pure Python; it imports no torch and no framework."""
