"""The recipe of examples/large_model.py: it equals one process, and what a rank holds is what was estimated."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import glora
from tests.helpers.ranks import on_two_ranks, whole

recipe: Any = pytest.importorskip("examples.large_model")
transformers: Any = pytest.importorskip("transformers")
load_file: Any = pytest.importorskip("safetensors.torch").load_file
pytestmark = pytest.mark.integration

BATCHES = torch.arange(5 * 4 * 16).reshape(5, 4, 16).mul(7) % 64


def largest_gathered(model: Any) -> list[int]:
    """Collects, at each block's forward and backward, what stands whole beside the parts; the largest first."""
    found = [0]

    def look(*_: Any) -> None:
        whole = [p for p in model.parameters() if not hasattr(p, "to_local")]
        found[0] = max(found[0], recipe.local_bytes(whole))

    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(look)
        layer.mlp.register_full_backward_hook(look)
    return found


def the_recipe(rank: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    base, adapter = Path(folder, "base"), Path(folder, "adapter")
    torch.manual_seed(0)
    alone: Any = transformers.LlamaForCausalLM(recipe.SMALL)
    plain = copy.deepcopy(alone)
    if rank == 0:
        plain.save_pretrained(base)
    dist.barrier()
    for config in (glora.GLoRAConfig.lora(init="random"), glora.GLoRAConfig.glora(create_bias=True, init="random")):
        alone = copy.deepcopy(plain)
        torch.manual_seed(1)
        glora.apply(alone, config=config)
        model = recipe.sharded(recipe.SMALL, base, lambda model, c=config: glora.apply(model, config=c))
        glora.load_state_dict(model, glora.state_dict(alone))
        gathered = largest_gathered(model)
        held = recipe.held(model, recipe.train(model, BATCHES[:3]))
        recipe.train(alone, BATCHES[:3])
        torch.testing.assert_close(whole(glora.state_dict(model)), glora.state_dict(alone), rtol=1e-3, atol=1e-5)
        # What is counted is what was estimated.
        expected = recipe.estimate(recipe.SMALL, config, ranks=2, tokens=0, width=4)
        assert held == {key: expected[key] for key in held}
        assert 0 < gathered[0] <= expected["gathered"]
        # From the file again, and on.
        glora.save(model, adapter)
        model = recipe.sharded(recipe.SMALL, base, lambda model: glora.load(model, adapter))
        glora.load(model, adapter)
        recipe.train(model, BATCHES[3:])
        recipe.train(alone, BATCHES[3:])
        torch.testing.assert_close(whole(glora.state_dict(model)), glora.state_dict(alone), rtol=1e-3, atol=1e-5)
        glora.save(model, adapter)
        if rank == 0 and not config.create_bias:
            recipe.merge_offline(base, adapter, Path(folder, "merged.safetensors"))
            merged = copy.deepcopy(plain)
            merged.load_state_dict(load_file(Path(folder, "merged.safetensors")))
            expected = alone(input_ids=BATCHES[0]).logits
            torch.testing.assert_close(merged(input_ids=BATCHES[0]).logits, expected, rtol=1e-3, atol=1e-5)
        dist.barrier()


def test_the_recipe_equals_one_process_and_holds_what_is_estimated(tmp_path: Path) -> None:
    on_two_ranks(the_recipe, str(tmp_path))
