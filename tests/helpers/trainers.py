"""A short training by transformers' Trainer, or one of its kind."""

from __future__ import annotations

from typing import Any

SHORT: dict[str, Any] = {
    "max_steps": 6,
    "save_steps": 3,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.05,
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
}
"""Arguments: six steps, a checkpoint after each third, on a CPU."""
