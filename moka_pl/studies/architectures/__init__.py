"""What works with which family of models, found out on tiny ones."""
