"""Which versions of the frameworks are supported: the only place that says it.

`setup.py` runs this file for the extras, so it imports nothing.  Outside the ranges the adapter of Megatron-core
refuses; that of DeepSpeed refuses only where a hook is missing, and otherwise warns.  `tests/test_versions.py` holds
the pins, the documents and the patches to these ranges.
"""

__all__ = ["DEEPSPEED", "DEEPSPEED_BF16", "MEGATRON_CORE", "TORCH"]

DEEPSPEED = ">=0.16,<0.20"
"""The tests run on both ends."""

DEEPSPEED_BF16 = ">=0.18.5"
"""Pipelines in bf16 get their own optimizer; 0.17.6 to 0.18.4 give them that of fp16, with its loss scale."""

MEGATRON_CORE = ">=0.16.1,<0.21"
"""The tests run on both ends: on the newest release, and on the main branch of Megatron-LM, 0.20.0 in development."""

TORCH = ">=2.7"
"""The tests run on the pinned version only; an adapter probes an older one for what it calls when it registers."""
