"""What ended a command, told once and by name."""
