"""What a training does to its machine over many minutes."""
