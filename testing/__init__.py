"""What tests and benchmarks run on: ranks in processes of their own, jobs of each framework, and their reference."""
