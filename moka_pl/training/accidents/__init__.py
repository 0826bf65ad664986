"""What goes wrong in training steps: numbers that are not finite, loss spikes, a lack of memory."""
