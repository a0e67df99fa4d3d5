"""Model soups: one network fine-tuned with several settings, its weights averaged.

    python examples/soup.py

A small network learns the handwritten digits of scikit-learn, turned by 15 degrees, after it has
learned them upright: with seven learning rates and seeds. The uniform soup is the mean of all; the
greedy soup adds one after the other, from the best on held-out images, and keeps what does not
lower the accuracy there. Held-out images need labels. (Model soups, arXiv 2203.05482.)
"""

from __future__ import annotations

import copy

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample

from adamerge import align

RATES = (1e-3, 1e-3, 2e-3, 2e-3, 3e-3, 3e-3, 5e-3)


def digits() -> tuple[Tensor, Tensor, Tensor]:
    """The images upright, turned, and their labels."""
    found = load_digits()
    order = torch.randperm(len(found.images), generator=torch.Generator().manual_seed(0))
    upright = torch.tensor(found.images, dtype=torch.float32)[order, None] / 8 - 1
    turn = torch.tensor([[0.966, -0.259, 0.0], [0.259, 0.966, 0.0]]).expand(len(upright), 2, 3)
    grid = affine_grid(turn, list(upright.shape), align_corners=False)
    turned = grid_sample(upright, grid, padding_mode="border", align_corners=False)
    return upright, turned, torch.tensor(found.target)[order]


def tuned(model: nn.Module, images: Tensor, labels: Tensor, rate: float, seed: int) -> nn.Module:
    """A copy of the model that has learned these images."""
    torch.manual_seed(seed)
    found = copy.deepcopy(model)
    optimizer = torch.optim.Adam(found.parameters(), rate)
    for _ in range(15):
        for batch in torch.randperm(len(images)).split(50):
            optimizer.zero_grad()
            cross_entropy(found(images[batch]), labels[batch]).backward()
            optimizer.step()
    return found


def main() -> dict[str, float]:
    """Prints and returns accuracies on the test images."""
    upright, turned, labels = digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    train, held_out, test = slice(0, 300), slice(300, 800), slice(800, None)
    model = tuned(model, upright[train], labels[train], 1e-3, 0)

    def accuracy(state: dict[str, Tensor], part: slice) -> float:
        filled = copy.deepcopy(model)
        filled.load_state_dict(state)
        return float((filled(turned[part]).argmax(1) == labels[part]).double().mean())

    states = [
        dict(tuned(model, turned[train], labels[train], rate, seed).state_dict())
        for seed, rate in enumerate(RATES)
    ]
    soup, kept = align.greedy(states, lambda state: accuracy(state, held_out))
    alone = [accuracy(state, held_out) for state in states]
    found = {
        "pretrained": accuracy(dict(model.state_dict()), test),
        "best fine-tuning": accuracy(states[alone.index(max(alone))], test),
        "uniform soup": accuracy(align.uniform(states), test),
        f"greedy soup of {len(kept)}": accuracy(soup, test),
    }
    for name, value in found.items():
        print(f"{name:18} {100 * value:.1f} %")
    return found


if __name__ == "__main__":
    main()
