"""Models by blocks: filled one after another, and taken apart."""
