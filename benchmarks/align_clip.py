"""CLIP image towers pretrained apart, aligned: what is between them, and what it costs at ViT-B/32.

    OMP_NUM_THREADS=1 python benchmarks/align_clip.py towers --out towers.md
    python benchmarks/align_clip.py cost --out cost.md

towers: the demo's CLIP is pretrained twice by the recipe of `make_demo.py`, from two seeds, with
fewer pictures and steps. The image towers are interpolated, and with them the class embeddings that
their text towers make of common names ("letter g"), as whole CLIPs would be. The features of two
CLIPs have no common order either: they are one more group, which stands in the projection and in
the class embeddings. Loss and accuracy are means over the five tasks' test pictures.

cost: two random ViT-B/32 image towers, and a permuted copy with noise, by `weight_matching`.
"""

from __future__ import annotations

import argparse
import copy
import platform
import resource
import sys
import time
from datetime import date
from pathlib import Path

import make_demo
import open_clip
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, normalize

from adamerge import TaskVectors, align
from adamerge.align.symmetry import Group, Place, Spec, State
from adamerge.images.demo import TASKS, TEST_SIZE

POINTS = torch.linspace(0, 1, 5).tolist()
Row = tuple[str, float, float, float]  # barrier, loss and accuracy at the midpoint


class Classifier(nn.Module):
    """An image tower and the class embeddings of every task: pictures -> logits of all tasks."""

    def __init__(self, clip: open_clip.CLIP) -> None:
        super().__init__()
        self.tower = clip.visual
        prompt = [make_demo.TEMPLATE]
        heads = {
            task: open_clip.build_zero_shot_classifier(
                clip, make_demo.tokenizer(), make_demo.COMMON_NAMES[task], prompt
            ).T
            for task in TASKS
        }
        self.heads = nn.ParameterDict({t: nn.Parameter(heads[t].contiguous()) for t in TASKS})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = normalize(self.tower(images), dim=-1)
        scale = make_demo.LOGIT_SCALE
        return {t: scale * features @ normalize(self.heads[t], dim=-1).T for t in TASKS}


def specs(module: Classifier) -> tuple[Spec, Spec]:
    """The tower's groups, and the features' alone, in the names of a classifier."""
    groups = {
        name: Group(
            group.units,
            tuple(Place(f"tower.{p.tensor}", p.axis, p.outer, p.reads) for p in group.places),
        )
        for name, group in align.spec(module.tower).groups.items()
    }
    heads = (Place(f"heads.{task}", 1, reads=True) for task in TASKS)
    features = Group(module.tower.output_dim, (Place("tower.proj", 1), *heads))
    return Spec(groups), Spec({"features": features})


def filled(module: Classifier, state: State) -> Classifier:
    found = copy.deepcopy(module)
    found.load_state_dict(dict(state))
    return found


@torch.no_grad()
def scored(module: nn.Module, test: dict[str, make_demo.Data]) -> tuple[float, float]:
    """Loss and accuracy in %, means over the tasks."""
    losses, right = [], []
    for task, (images, labels) in test.items():
        logits = module(images)[task]
        losses.append(float(cross_entropy(logits, labels)))
        right.append(100 * float((logits.argmax(1) == labels).double().mean()))
    return sum(losses) / len(losses), sum(right) / len(right)


def learned(one: Classifier, two: Classifier, unlabeled: dict[str, Tensor]) -> Classifier:
    """A coefficient per layer that minimises the entropy of every task's own predictions."""
    states = one.state_dict(), two.state_dict()
    vectors = TaskVectors(states[0], {"second": states[1]})
    coefficients = torch.full((1, len(vectors.names)), 0.5, requires_grad=True)
    optimizer = torch.optim.Adam([coefficients], 1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        weights, loss = {**vectors.combine(coefficients), **vectors.constants}, torch.zeros(())
        for task, images in unlabeled.items():
            chosen = torch.randint(len(images), (16,), generator=generator)
            logs = functional_call(one, weights, images[chosen])[task].log_softmax(1)
            loss = loss - (logs.exp() * logs).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return filled(one, {**vectors.combine(coefficients.detach()), **vectors.constants})


def towers(steps: int, pictures: int) -> list[str]:
    """The table of what is between two towers."""
    make_demo.PRETRAIN_STEPS, make_demo.TRAIN_SIZE = steps, pictures
    one, two = (
        Classifier(make_demo.pretrain(seed)).eval().requires_grad_(False) for seed in (0, 1)
    )
    test = {task: make_demo.load(task, "test", TEST_SIZE) for task in TASKS}
    unlabeled = {task: make_demo.load(task, "train", 64)[0] for task in TASKS}
    batches = [torch.cat(list(unlabeled.values()))]
    inside, features = specs(one)
    whole = Spec({**inside.groups, **features.groups})
    matched = align.weight_matching(whole, one.state_dict(), two.state_dict())
    by_weights = filled(two, align.apply(whole, matched, two.state_dict()))
    active = align.activation_matching(inside, one, two, batches)
    state = align.apply(inside, active, two.state_dict())
    last = align.weight_matching(features, one.state_dict(), state)
    by_outputs = filled(two, align.apply(features, last, state))
    rows: list[Row] = []
    others = {"naive": two, "weight matching": by_weights, "activation matching": by_outputs}
    for title, other in others.items():
        ends = [one, other]
        states = [module.state_dict() for module in ends]
        for mend in ("", ", REPAIR"):
            curve = []
            for t in POINTS:
                middle = filled(one, align.average(states, [1 - t, t]))
                if mend:
                    middle = align.repair(inside, middle, ends, batches, [1 - t, t])
                curve.append(scored(middle, test))
            first, last_loss = curve[0][0], curve[-1][0]
            barrier = max(
                loss - (1 - t) * first - t * last_loss
                for t, (loss, _) in zip(POINTS, curve, strict=True)
            )
            rows.append((title + mend, barrier, *curve[len(POINTS) // 2]))
        rows.append((f"{title}, λ learned", float("nan"), *scored(learned(*ends, unlabeled), test)))
    for title, module in (("the first tower", one), ("the second tower", two)):
        rows.append((title, 0.0, *scored(module, test)))
    chance = 100 * sum(1 / len(make_demo.COMMON_NAMES[task]) for task in TASKS) / len(TASKS)
    head = "| | barrier of the test loss | loss at the midpoint | accuracy at the midpoint, % |"
    lines = [f"{steps} steps on {pictures} pictures a task each; chance is {chance:.1f} %.", ""]
    lines += [head, "|---|--:|--:|--:|"]
    for title, barrier, loss, accuracy in rows:
        height = "" if barrier != barrier else f"{barrier:.3f}"
        lines.append(f"| {title} | {height} | {loss:.3f} | {accuracy:.1f} |")
    return lines


def cost() -> list[str]:
    """Seconds and memory of aligning ViT-B/32."""
    torch.set_num_threads(2)
    shape = open_clip.get_model_config("ViT-B-32")
    vision = {**shape["vision_cfg"], "embed_dim": shape["embed_dim"], "heads": 12, "mlp_ratio": 4.0}
    vision["output_dim"] = vision.pop("embed_dim")
    torch.manual_seed(0)
    one, two = (open_clip.transformer.VisionTransformer(**vision) for _ in range(2))
    spec, state = align.spec(one), one.state_dict()
    copied = align.apply(spec, align.drawn(spec, seed=1), state)
    copied = {n: t + t.std() * torch.randn_like(t) if t.ndim > 1 else t for n, t in copied.items()}
    lines = ["| | seconds | CPU seconds | groups |", "|---|--:|--:|--:|"]
    pairs = {"two random towers": two.state_dict(), "a permuted copy with noise": copied}
    for title, other in pairs.items():
        wall, cpu = time.perf_counter(), time.process_time()
        align.weight_matching(spec, state, other)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        lines.append(f"| {title} | {wall:.0f} | {cpu:.0f} | {len(spec.groups)} |")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return [*lines, "", f"Two threads; {peak:.1f} GiB at the most, both towers and both pairs."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("towers", "cost"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--pictures", type=int, default=1500)
    parser.add_argument("--out", type=Path, help="a Markdown file")
    given, start = parser.parse_args(), (time.perf_counter(), time.process_time())
    lines = cost() if given.what == "cost" else towers(given.steps, given.pictures)
    wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    about = f"{date.today()}, {versions}, {wall:.0f} seconds, {cpu:.0f} CPU seconds."
    command = f"    python benchmarks/align_clip.py {' '.join(sys.argv[1:])}"
    text = "\n".join([about, "", command, "", *lines]) + "\n"
    print(text)
    if given.out:
        given.out.write_text(text)


if __name__ == "__main__":
    main()
