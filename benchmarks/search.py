"""Switching a supernet of 48 layers to another choice: `python -m benchmarks.search`."""

from __future__ import annotations

import random

import torch
from torch import nn

import glora
from benchmarks import report
from benchmarks.timing import interleaved


class Block(nn.Module):
    """A transformer block's linear layers, norms and activations."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.act, self.down = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)


def main() -> None:
    options = report.start(report.options_of("search", __doc__))
    rng, rows = random.Random(0), []
    for layers in (48, 192):
        model = nn.Sequential(*[Block(64) for _ in range(layers // 4)])
        glora.search.supernet(model, "all-linear", glora.search.Space())
        found = glora.search.spaces(model)
        assert len(found) == layers
        choices = [
            {
                path: space.config({p: rng.choice(forms) for p, forms in space.forms.items()}, rng.choice(space.ranks))
                for path, space in found.items()
            }
            for _ in range(20)
        ]

        def switch(model: nn.Module = model, choices: list[dict[str, glora.GLoRAConfig]] = choices) -> None:
            glora.search.choose(model, choices[rng.randrange(20)])

        timing = interleaved({"choose": switch}, seconds=5.0)["choose"]
        rows.append({"layers": layers, **report.milliseconds("choose", timing)})
    report.table("glora.search.choose", rows)
    report.write_csv(options.out / "search-choose.csv", rows, options.about)
    if (slow := rows[0]["choose_ms"]) >= 5:
        print(f"48 layers must switch within 5 ms; found {slow:.2f} ms")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
