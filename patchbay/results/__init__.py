"""Results: what every method returns, how it is printed, saved and made again, and what is true of every method."""
