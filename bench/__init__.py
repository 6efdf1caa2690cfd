"""Benchmarks: the same work in Patchbay and in plain Hugging Face, timed in the same run, with the targets it has to meet.

`python -m bench` runs every section and writes RESULTS.md; `python -m bench foundation --only load` runs a part and prints it.
"""
