"""The page, the notebook's view and the saved file: one front end drawn from Results. Nothing here computes a number that is shown."""
