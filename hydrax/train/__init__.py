"""Training: objective, optimisers, the pure step, checkpoints, records and the loop around them."""
