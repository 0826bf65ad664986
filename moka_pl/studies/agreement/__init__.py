"""How far the package's scores and the lm-evaluation-harness agree."""
