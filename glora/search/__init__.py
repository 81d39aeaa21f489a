"""The paper's search: a supernet of all forms, from which every layer finds its own, under a budget of parameters.

Source: GLoRA, arXiv 2306.07967, section 3.3; weight entanglement is AutoFormer's, arXiv 2107.00651.
"""

from glora.search.evolution import evolve
from glora.search.extraction import extract
from glora.search.guide import knapsack, sensitivity
from glora.search.pictures import plot_forms, plot_front
from glora.search.result import Result, Trial, read_targets, write_targets
from glora.search.space import Space
from glora.search.supernet import choose, spaces, supernet

__all__ = [
    "Result",
    "Space",
    "Trial",
    "choose",
    "evolve",
    "extract",
    "knapsack",
    "plot_forms",
    "plot_front",
    "read_targets",
    "sensitivity",
    "spaces",
    "supernet",
    "write_targets",
]
