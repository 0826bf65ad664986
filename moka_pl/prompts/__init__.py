"""Every text that a model is shown, and where in it an answer stands."""
