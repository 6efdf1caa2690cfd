"""What is true of every method, as checks that `patchbay check-method` runs on one outside the package."""
