"""Tests with real frameworks and real processes: gloo on CPU always, NCCL where the machine has a GPU per rank."""
