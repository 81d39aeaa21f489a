"""One layer: what it holds and computes while it is adapted."""
