"""What is true of any causal language model: attention, scoring, recorded steps."""
