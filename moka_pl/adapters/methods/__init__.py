"""Adapter methods, one a file: MoKA, PEFT's and full fine-tuning."""
