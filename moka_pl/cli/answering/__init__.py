"""What the commands share that let a model answer."""
