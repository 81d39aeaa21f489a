"""Many adapters on one server: one model in memory, and each request of a batch through its own adapter.

    pip install -e ".[examples,files]"
    python examples/many_adapters.py

Half a minute on two CPU cores. Nothing is downloaded.
"""

# %% [markdown]
# ## The task
#
# A server has one base model and many customers, each with an adapter of their own. A batch has requests of several of
# them. `glora.route` sends each sample through its own adapter: the product with the base's weight is made once for the
# whole batch, and only the small factors differ. The adapters may be of different kinds.

# %%
from __future__ import annotations

import copy
import threading
import time
from pathlib import Path

import torch
from shared import done, draw, options, train
from torch import Tensor, nn

import glora
from glora.text import table

# %% [markdown]
# ## A base, and a task for each customer
#
# Each customer has a hidden linear map of the inputs, which the base does not know. Every customer's adapter has a kind
# of its own: a LoRA, a vector for each channel, all five paths, HiRA.

# %%
KINDS = {
    "lora": glora.GLoRAConfig.lora(rank=4),
    "vectors": glora.GLoRAConfig.ssf(),
    "glora": glora.GLoRAConfig.glora(rank=2),
    "hira": glora.GLoRAConfig.hira(rank=4),
}


def base_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 8))


def adapters(base: nn.Module, folder: Path, steps: int) -> dict[str, list[float]]:
    """Train an adapter for each customer on a copy of the base, and save it; the losses."""
    losses: dict[str, list[float]] = {}
    for name, config in KINDS.items():
        model, task = glora.apply(copy.deepcopy(base), config=config), torch.randn(32, 8) / 6

        def loss(model: nn.Module = model, task: Tensor = task) -> Tensor:
            x = torch.randn(128, 32)
            return (model(x) - x @ task).square().mean()

        losses[name] = train(glora.parameter_groups(model, 1e-2), loss, steps, 1e-2, name, folder)
        glora.save(model, folder / name)
    return losses


# %% [markdown]
# ## Serving
#
# Adapters are loaded beside each other. `trainable=False` leaves gradients out. A batch names the adapter of each of
# its samples; `None` is the base.


# %%
def serve(model: nn.Module, requests: list[tuple[str | None, Tensor]]) -> Tensor:
    """The answers to a batch of requests, each of a customer."""
    with torch.no_grad(), glora.route(model, [name for name, _ in requests]):
        return model(torch.stack([x for _, x in requests]))


def one_after_the_other(model: nn.Module, requests: list[tuple[str | None, Tensor]]) -> Tensor:
    """The same by switching: `activate` changes the model for every thread, and each call has one adapter."""
    answers: list[Tensor] = []
    for name, x in requests:
        glora.activate(model, {} if name is None else name)
        with torch.no_grad():
            answers.append(model(x))
    return torch.stack(answers)


# %% [markdown]
# A route belongs to the thread that entered it. So a server may have a thread for each batch, without a lock.


# %%
def in_threads(model: nn.Module, batches: list[list[tuple[str | None, Tensor]]]) -> list[Tensor]:
    """Each batch in a thread of its own."""
    answers: list[Tensor] = [torch.empty(0)] * len(batches)

    def work(index: int) -> None:
        answers[index] = serve(model, batches[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


# %% [markdown]
# ## All together
#
# At the end a customer sends a new version. `replace=True` puts it in the place of the old one (hot swap), while all
# others stay.


# %%
def main() -> None:
    chosen = options(__doc__, "many_adapters", steps=300, requests=64)
    base = base_model()
    draw(adapters(base, chosen.out, chosen.steps), chosen.out / "learning_curve.png")

    model = base
    for name in KINDS:
        glora.load(model, chosen.out / name, name, trainable=False)
    print(glora.summary(model))

    names = [*KINDS, None]
    requests = [(names[i % len(names)], torch.randn(32)) for i in range(chosen.requests)]
    rows: list[list[str]] = []
    answers: list[Tensor] = []
    for way, call in (("one batch, routed", serve), ("one after the other", one_after_the_other)):
        call(model, requests)
        started = time.perf_counter()
        answers.append(call(model, requests))
        rows.append([way, f"{1000 * (time.perf_counter() - started):.1f}"])
    print(table(f"{len(requests)} requests of {len(names)} customers", ["way", "milliseconds"], rows))
    print(f"largest difference between the two: {(answers[0] - answers[1]).abs().max():.1e}")

    threaded = in_threads(model, [requests, requests[::-1]])
    print(f"two threads: largest difference {(threaded[0] - threaded[1].flip(0)).abs().max():.1e}")

    glora.load(model, chosen.out / "lora", "lora", trainable=False, replace=True)
    print(f"adapters: {', '.join(glora.adapters(model))}")
    done(chosen.out)


if __name__ == "__main__":
    main()
