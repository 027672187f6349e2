"""Models: the wiring of layers, and how weights get into them."""
