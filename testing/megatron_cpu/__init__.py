"""Stock Megatron on a CPU-only machine, for the tests: `shim.install()` before Megatron is imported, or

python -m testing.megatron_cpu MODULE ARGUMENTS...       # instead of python -m MODULE ARGUMENTS...
"""
