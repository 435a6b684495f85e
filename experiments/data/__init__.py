"""Training data: sources, prompt formats, encoding, overlap with the benchmarks, generated facts."""
