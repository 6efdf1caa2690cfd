"""Papers: the catalogue of published methods, and their claims checked on a model."""
