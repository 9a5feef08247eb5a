"""Folders that are watched: what changes in them is brought into an index, and nothing else."""
