"""Pure tests: no process group, seconds."""
