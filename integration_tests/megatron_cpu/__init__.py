"""Stock Megatron on a CPU-only machine, for the tests: `shim.install()` before Megatron is imported, or

python -m integration_tests.megatron_cpu MODULE ARGUMENTS...       # instead of python -m MODULE ARGUMENTS...
"""
