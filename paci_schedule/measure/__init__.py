"""What layers cost on a device: their seconds and bytes."""
