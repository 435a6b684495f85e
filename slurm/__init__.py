"""SLURM: a table's cells as one array, and what each of its tasks does."""
