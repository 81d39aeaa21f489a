"""The paper's search: a supernet of all forms, from which every layer finds its own, under a budget of parameters.

Source: GLoRA, arXiv 2306.07967, section 3.3; weight entanglement is AutoFormer's, arXiv 2107.00651.
"""

from glora.search.choices import choose, spaces
from glora.search.evolution import evolve
from glora.search.result import Result, Trial
from glora.search.space import Space
from glora.search.supernet import extract, supernet

__all__ = [
    "Result",
    "Space",
    "Trial",
    "choose",
    "evolve",
    "extract",
    "spaces",
    "supernet",
]
