"""Sweeps: many edits in one pass, restarted from a base run, scored, kept and resumed."""
