"""The core: what a schedule is, in pure Python.  It imports neither torch nor a framework."""
