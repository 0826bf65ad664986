"""What several suites, or many methods of one, tell together."""
