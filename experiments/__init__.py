"""Entry points, data sets, cells and run records."""
