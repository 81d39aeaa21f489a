"""Frameworks that hold or run a model's tensors in their own way; each hangs itself on the door (Note [One door])."""

from glora.engines import ddp, fill, fsdp

__all__ = ["ddp", "fill", "fsdp"]
