"""Rates that follow the text against fixed ones, at the same cost."""
