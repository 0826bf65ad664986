"""Whether training finds the structure of synthetic teachers."""
