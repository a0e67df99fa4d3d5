"""The other side of `peers.py`: the classes and loops of the package `fusion-bench`, as they are.

Only what it leaves to a subclass or reads from files is given here: models, batches, classifiers
and the settings of its configuration files; and marks of the time at which a step begins and ends.
"""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from fusion_bench.method.adamerging.clip_layer_wise_adamerging import (
    CLIPLayerWiseAdaMergingAlgorithm,
)
from fusion_bench.method.we_moe.clip_we_moe import CLIPWeightEnsemblingMoEAlgorithm
from fusion_bench.models.we_moe import WeightEnsemblingMoE
from hardware import now
from lightning import Fabric
from omegaconf import DictConfig
from peers_world import INIT, RATE, SCALE, World, transformers_tower
from torch import Tensor, nn

# fusion_bench_config/method/adamerging/clip.yaml and wemoe/weight_ensembling_moe.yaml, 0.2.33
ADAMERGING = {
    **{"weights": None, "optimizer": "adam", "lr": RATE, "init_values": INIT},
    **{"clamp_weights": False, "tie_weights": True, "strict": False},
}
WEMOE = {
    **{"router_hidden_layers": 2, "init_lambda": INIT, "lr": 1e-4, "optimizer": "adam"},
    "use_grad_accumulate": False,
}


class Pool:
    """Models by name, as its pools give them."""

    def __init__(self, world: World) -> None:
        self.world, self.model_names = world, list(world.tasks)
        self.model = transformers_tower(world.shape).to(world.device)

    def load_model(self, name: str) -> nn.Module:
        known = name == "_pretrained_"
        state = self.world.converted(self.world.pretrained if known else self.world.expert(name))
        model = copy.deepcopy(self.model)
        model.load_state_dict({k: t for k, t in state.items() if "visual_projection" not in k})
        return model


class Marks(Fabric):
    """A Fabric that notes when it was last used for a backward pass or a log line."""

    def __init__(self, device: torch.device, bf16: bool) -> None:
        precision: Any = "bf16-mixed" if bf16 else "32-true"
        super().__init__(accelerator=device.type, devices=1, precision=precision)
        self.begun = self.after_backward = self.logged = 0.0
        self.look: Callable[[], None] = lambda: None  # before the optimizer's step

    def backward(self, tensor: Tensor, *args: Any, **kwargs: Any) -> None:
        super().backward(tensor, *args, **kwargs)
        self.after_backward = now(self.device)
        self.look()

    def log_dict(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self.logged = now(self.device)


class _Given:
    """Batches and classifiers for `compute_logits` of its CLIP mixin."""

    world: World
    marks: Marks

    def give(self, world: World, bf16: bool) -> None:
        own: Any = self
        self.world, self.marks = world, Marks(world.device, bf16)
        own.modelpool = Pool(world)
        own._fabric_instance = own._fabric = self.marks
        own.visual_projection = nn.Linear(world.shape.width, world.shape.dim, bias=False).to(
            world.device
        )
        own.visual_projection.weight = nn.Parameter(world.projection, requires_grad=False)
        own.logit_scale_exp = torch.tensor(SCALE, device=world.device)
        own.zeroshot_weights = dict(zip(world.tasks, world.classifiers, strict=True))

    def on_test_time_adaptation_start(self) -> None:
        pass

    def get_shuffled_test_loader_iter(self, task: str) -> Iterator[tuple[Tensor, None]]:
        if task == self.world.tasks[0]:
            self.marks.begun = now(self.world.device)
        return itertools.repeat((self.world.images[self.world.tasks.index(task)], None))

    def print_profile_summary(self, title: str | None = None) -> None:
        pass


class LayerWise(_Given, CLIPLayerWiseAdaMergingAlgorithm):  # type: ignore[misc]
    """Its layer-wise AdaMerging."""


class Mixtures(_Given, CLIPWeightEnsemblingMoEAlgorithm):  # type: ignore[misc]
    """Its WEMoE."""


def quietly(work: Callable[[], Any]) -> Any:
    """Without what it prints, its progress bars among it."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return work()


class TheirLayerWise:
    """Its algorithm and its merged model; `learn` is its own loop."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.algorithms: dict[bool, Any] = {}
        for bf16 in (False, True):
            self.algorithms[bf16] = LayerWise(DictConfig({**ADAMERGING, "max_steps": 1}))
            self.algorithms[bf16].give(world, bf16)
        algorithm = self.algorithms[False]
        self.module = quietly(
            lambda: algorithm.construct_layer_wise_merged_model(algorithm.modelpool)
        ).to(world.device)

    def learn(self, steps: int, bf16: bool) -> float:
        """Runs its loop; the seconds of the last step, without the merge before the first."""
        algorithm = self.algorithms[bf16]
        algorithm.config.max_steps = steps
        quietly(lambda: algorithm.test_time_adaptation(self.module))
        return algorithm.marks.logged - algorithm.marks.begun

    def restart(self) -> None:
        with torch.no_grad():
            self.module.merge_weight.fill_(INIT)
        self.module._merged_state_dict = None

    def merging(self, grads: Mapping[str, Tensor]) -> None:
        """Its merge, and the backward pass through it of every task, given dL/dW."""
        merged = self.module.merge_weights()
        live = [merged[name] for name in grads]
        for _ in self.world.tasks:
            torch.autograd.backward(live, list(grads.values()), retain_graph=True)
        self.restart()
        self.module.merge_weight.grad = None

    def layers(self) -> dict[str, tuple[int, ...]]:
        return {n: tuple(p.shape) for n, p in self.module.pretrained_model.named_parameters()}

    def table(self) -> dict[str, Tensor]:
        """λ `[T]` by layer."""
        return dict(zip(self.layers(), self.module.merge_weight.detach().cpu().T, strict=True))


class TheirMixtures:
    """A tower with its `WeightEnsemblingMoE` for every MLP; `learn` is its own loop.

    Its `construct_moe_model` looks for `vision_model`, which towers of transformers 5 do not have:
    its lines are followed here on the flat tower.
    """

    def __init__(self, world: World, batch_reduce: bool) -> None:
        self.world = world
        self.algorithm: Any = Mixtures(DictConfig({**WEMOE, "max_steps": 1}))
        self.algorithm.give(world, False)
        pool = self.algorithm.modelpool
        base = pool.load_model("_pretrained_")
        experts = [pool.load_model(name) for name in pool.model_names]
        self.model: Any = pool.load_model("_pretrained_").requires_grad_(False)
        with torch.no_grad():
            for parts in zip(*(m.parameters() for m in (self.model, base, *experts)), strict=True):
                parts[0].add_(sum(part - parts[1] for part in parts[2:]), alpha=INIT)
            for index, layer in enumerate(self.model.encoder.layers):
                layer.mlp = WeightEnsemblingMoE(
                    hidden_size=world.shape.width,
                    base_model=base.encoder.layers[index].mlp,
                    expert_models=[expert.encoder.layers[index].mlp for expert in experts],
                    init_lambda=INIT,
                    batch_first=True,
                    router_hidden_layers=2,
                    batch_reduce=batch_reduce,
                ).to(world.device)

    def learn(self) -> float:
        """One step of its loop; the seconds of its forward and backward."""
        quietly(lambda: self.algorithm.test_time_adaptation(self.model))
        return self.algorithm.marks.after_backward - self.algorithm.marks.begun

    def gradients(self) -> dict[str, Tensor]:
        """The routers' gradients of one step of its loop."""
        found: dict[str, Tensor] = {}

        def look() -> None:
            found.update({name: p.grad.clone() for name, p in self.routers().items()})

        self.algorithm.marks.look = look
        self.learn()
        self.algorithm.marks.look = lambda: None
        return found

    def routers(self) -> dict[str, Tensor]:
        """Parameters of the routers, named as ours."""
        return {
            f"routers.{index}.{name}": parameter
            for index, layer in enumerate(self.model.encoder.layers)
            for name, parameter in layer.mlp.gate.named_parameters()
        }
