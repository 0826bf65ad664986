"""Research on adapters: comparisons, benchmarks, synthetic teachers. Nothing outside imports it."""
