"""Feed: the papers that are published, read from their sources into one store, each beside what of it runs here."""
