"""What is true of any causal language model: architecture, attention, scoring, recorded steps."""
