"""Features: sparse dictionaries of a model's signals, from their files to parts of the model."""
