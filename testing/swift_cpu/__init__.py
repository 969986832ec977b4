"""What the tests need so that ms-swift's own command trains on the CPU: a model, data, and what is absent there."""
