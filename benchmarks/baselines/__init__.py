"""Rivals of concepts behind one protocol (`base.Baseline`); what needs packages of its own runs as a process."""
