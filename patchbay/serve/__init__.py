"""What answers over a wire: the OpenAI-compatible server, the agents' tools, and what keeps both from strangers (`guard.py`)."""
