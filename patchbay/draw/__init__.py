"""Drawing: Results as figures, wiring as a map, reports as pages, tables on a screen. Computes nothing."""
