"""Files: one adapter, and a checkpoint merged without a model."""
