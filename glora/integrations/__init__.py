"""What a framework needs to keep adapters alone in its checkpoints: `trainer` (transformers), `lightning`."""
