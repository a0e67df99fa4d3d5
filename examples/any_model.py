"""Merging ResNets with BatchNorm: three experts, images of your own, no labels to learn the merge.

    python examples/any_model.py

A torchvision ResNet is pretrained on three tasks and fine-tuned on each: three experts. They are
merged with coefficients learned on unlabeled images, one per task or one per task and layer, and
the merge is put back into an ordinary ResNet. Ten seconds on one core.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchvision.models.resnet import BasicBlock, ResNet

import adamerge

TASKS, CLASSES, SIDE = ("stripes", "colours", "corners"), 4, 16
COLOURS = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0.0]])


def images(task: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy pictures `[count, 3, 16, 16]` and their classes `[count]`."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (count,), generator=generator)
    noise = 1.5 * torch.randn(count, 3, SIDE, SIDE, generator=generator)
    down, right = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    if task == "stripes":  # the class is their direction
        along = torch.stack([down, right, down + right, down - right])
        return noise + (along * torch.pi / 3).sin()[y][:, None], y
    if task == "colours":
        return noise + COLOURS[y][..., None, None], y
    corner = 2 * (down >= SIDE // 2) + (right >= SIDE // 2)
    return noise + 1.2 * (corner == y[:, None, None])[:, None], y


def train(network: nn.Module, heads: nn.ModuleDict, tasks: tuple[str, ...], steps: int) -> None:
    """With labels, as whoever made the experts did."""
    optimizer = torch.optim.Adam([*network.parameters(), *heads.parameters()], lr=4e-3)
    network.train()
    for step in range(steps):
        optimizer.zero_grad()
        for task in tasks:
            x, y = images(task, 32, seed=1000 + step)
            cross_entropy(heads[task](network(x)), y).backward()
        optimizer.step()
    network.eval()


@torch.no_grad()
def accuracy(network: nn.Module, heads: nn.ModuleDict) -> float:
    """The mean over the tasks, in %, on images that no training has seen."""
    tests = {task: images(task, 200, seed=1) for task in TASKS}
    right = [heads[task](network(x)).argmax(1).eq(y) for task, (x, y) in tests.items()]
    return 100 * torch.cat(right).float().mean().item()


torch.manual_seed(2)
resnet = ResNet(BasicBlock, [1, 1, 1, 1])
resnet.layer3, resnet.layer4, resnet.fc = nn.Identity(), nn.Identity(), nn.Identity()  # small
heads = nn.ModuleDict({task: nn.Linear(128, CLASSES) for task in TASKS})
train(resnet, heads, TASKS, steps=3)
experts = {task: copy.deepcopy(resnet) for task in TASKS}
for task, expert in experts.items():
    train(expert, heads, (task,), steps=40)

vectors = adamerge.TaskVectors(resnet, experts)
loaders = {t: DataLoader(images(t, 256, seed=2)[0], batch_size=32, shuffle=True) for t in TASKS}
for granularity in ("task", "layer"):
    method = adamerge.methods.AdaMerging(resnet, vectors, granularity=granularity)
    merged = copy.deepcopy(resnet)
    merged.load_state_dict(method.merged_state_dict())
    before = accuracy(merged, heads)
    adamerge.adapt(method, loaders, "infomax", heads, steps=30, lr=5e-3)
    merged.load_state_dict(method.merged_state_dict())
    print(f"{granularity}-wise: {before:.1f} % before, {accuracy(merged, heads):.1f} % after")
