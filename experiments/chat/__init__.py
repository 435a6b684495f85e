"""Tournaments of answers: prompts, contestants' answers, judges, verdicts, and the page for human raters."""
