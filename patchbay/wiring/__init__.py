"""Wiring: parts as factors of the weights, and what one part reads of another."""
