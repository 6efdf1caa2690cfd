"""Edits: values that say what to do at a port, and what each of them does to a signal."""
