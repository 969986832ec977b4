"""What a single GPU can tell about the CUDA path, in one command: see `benchmarks.gpu.__main__`."""
