"""Training: one loop, and a file for each method that says what trains and what the loss is."""
