"""Model: any causal language model behind one view of its parts, proved before any part is shown; and its runs."""
