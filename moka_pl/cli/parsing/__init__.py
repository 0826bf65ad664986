"""The parsers of commands, and how they tell mistakes."""
