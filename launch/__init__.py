"""Training programmes: a GPT-2 on real text with DeepSpeed, the quick start, and the comparison of two runs."""
