"""Several named adapters on one base: switched, disabled, mixed, and side by side in one batch."""
