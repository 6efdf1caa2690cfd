"""Jacks: how signals are reached while a model runs. The only room that touches hooks and forwards."""
