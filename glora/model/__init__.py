"""A whole model: what walks or changes it."""
