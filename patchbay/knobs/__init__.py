"""Knobs: edits with a strength; rows of them, folded into weights, written as files that others load."""
