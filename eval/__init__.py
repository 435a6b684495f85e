"""Scoring: the glue between our models and lm-evaluation-harness."""
