"""Which versions of the frameworks are supported: the only place that says it.

`setup.py` runs this file for the extras, so it imports nothing.  The adapters refuse a framework outside its range, and
`tests/test_versions.py` holds the pins, the documents and the patches to these ranges.
"""

__all__ = ["DEEPSPEED", "MEGATRON_CORE", "TORCH"]

DEEPSPEED = ">=0.19.8,<0.20"
"""The version that the tests run on, and the patch releases after it."""

MEGATRON_CORE = ">=0.16.1,<0.21"
"""The tests run on both ends: on the newest release, and on the main branch of Megatron-LM, 0.20.0 in development."""

TORCH = ">=2.7"
"""The tests run on the pinned version only; an adapter probes an older one for what it calls when it registers."""
