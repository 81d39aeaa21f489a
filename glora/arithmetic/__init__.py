"""Adapters from other adapters, and from models: weighted sums, and what comes closest to a fine-tuned checkpoint."""
