"""Training of the real suite: a small CLIP on captioned images, then an expert per task.

As on the web, the words that name a class officially are rare in the captions: a picture of the
letter G is captioned "a photo of a letter g", and by its official name, "gustav", once in `RARE`
captions. The features separate the classes, the heads know their names badly, and fine-tuning,
with the heads frozen, moves each task's features towards them.

Test splits choose nothing: settings of the experts are chosen by training on nine tenths of the
train splits and measuring on the rest (`make_real.py tune`).
"""

import copy
import io
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from datasets import Dataset
from make_demo import MEAN, STD, round_weights, train
from PIL import Image
from real_words import COMMON, DOMAINS, MIRRORED, OFFICIAL, TASKS
from torch import Tensor, nn
from torch.func import functional_call

RARE = 200  # of a class's captions, one in so many bears the official name
FINETUNE_STEPS, FINETUNE_RATE, FINETUNE_SHIFT = 500, 1e-3, 2
TEMPLATE = "a photo of a {}."  # of the heads; captions use others too
TEMPLATES = (TEMPLATE, "a picture of a {}.", "a small {}.", "{}")
VISION = {"image_size": 32, "patch_size": 8, "width": 128, "layers": 5, "head_width": 32}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
MODEL = {"embed_dim": 64, "vision_cfg": {**VISION, "pool_type": "avg"}, "text_cfg": TEXT}

Data = tuple[Tensor, Tensor]
State = dict[str, Tensor]


class Cycle(NamedTuple):
    """A part of the pretraining: its rates rise and fall once, its optimizers begin anew."""

    steps: int
    scale: float  # logarithm of the logit scale, exact in bfloat16
    shift: int  # images are shifted by up to so many pixels
    template_each: bool  # a caption template for each image, or one for a domain's images of a step


CYCLES = (Cycle(1600, 3.0, 3, True), Cycle(1800, 4.0, 2, False))


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) for equal-shaped matrices at once, in float32.

    torch's own works in bfloat16, which is ten times slower on a CPU without such units.
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float) -> None:
        super().__init__(matrices, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        group = self.param_groups[0]
        for shape in {p.shape for p in group["params"]}:
            same = [p for p in group["params"] if p.shape == shape]
            gradient = torch.stack([p.grad for p in same])
            momentum = self.state[same[0]].setdefault("momentum", torch.zeros_like(gradient))
            momentum.lerp_(gradient, 0.05)
            moves = orthogonal(gradient.lerp(momentum, 0.95))
            rate = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
            for parameter, move in zip(same, moves, strict=True):
                parameter.sub_(move, alpha=rate)


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """The matrices `[N, R, C]` with all singular values near 1, by Newton-Schulz iterations."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = 3.4445 * x + (2.0315 * square @ square - 4.775 * square) @ x
    return x.mT if tall else x


def load(folder: Path, domain: str, split: str) -> Data:
    """Pixels `[N, 3, 32, 32]` as bytes, and labels `[N]`, of `<domain>-<split>.parquet`."""
    rows = Dataset.from_parquet(str(folder / f"{domain}-{split}.parquet"), keep_in_memory=True)
    images = rows.cast_column("image", rows.features["image"].__class__(decode=False))["image"]
    pixels = [np.asarray(Image.open(io.BytesIO(i["bytes"])).convert("RGB")) for i in images]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), torch.tensor(rows["label"])


def normalised(pixels: Tensor) -> Tensor:
    """What the tower is given of pixels that are bytes."""
    return pixels.float().div(255).sub(MEAN).div(STD)


def augmented(pixels: Tensor, shift: int, mirror: bool, rng: np.random.Generator) -> Tensor:
    """Normalised images, shifted by up to `shift` pixels, lit otherwise, perhaps mirrored."""
    count, _, height, width = pixels.shape
    padded = F.pad(normalised(pixels), (shift,) * 4, mode="replicate")
    moves = (torch.from_numpy(rng.integers(0, 2 * shift + 1, (count, 1))) for _ in range(2))
    down, right = moves
    rows, columns = down + torch.arange(height), right + torch.arange(width)
    if mirror:
        flip = torch.from_numpy(rng.random((count, 1)) < 0.5)
        columns = torch.where(flip, columns.flip(1), columns)
    each = torch.arange(count)[:, None, None]
    images = padded[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    contrast = torch.from_numpy(rng.uniform(0.8, 1.25, (count, 1, 1, 1))).float()
    return images * contrast + torch.from_numpy(rng.normal(0, 0.15, (count, 1, 1, 1))).float()


def build_model(vocabulary: int, scale: float = CYCLES[-1].scale) -> open_clip.CLIP:
    """The small CLIP with its logit scale fixed; `vocabulary` is the number of token embeddings."""
    model = open_clip.CLIP(**{**MODEL, "text_cfg": {**TEXT, "vocab_size": vocabulary}})
    model.logit_scale.data.fill_(scale)
    model.logit_scale.requires_grad_(False)
    return model


def tokenizer() -> open_clip.SimpleTokenizer:
    """CLIP's own tokenizer at the suite's context length."""
    return open_clip.SimpleTokenizer(context_length=TEXT["context_length"])


def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the transformer blocks, AdamW for all else."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    blocks = [name for name, p in trained.items() if "resblocks" in name and p.ndim == 2]
    muon = Muon([trained.pop(name) for name in blocks], lr=0.02)
    return [muon, torch.optim.AdamW(trained.values(), lr=4e-3, weight_decay=0.01)]


def captions() -> tuple[list[str], dict[tuple[str, int], tuple[list[int], int | None]]]:
    """All captions, and for each domain and label the rows of its common ones and the rare one."""
    rows: list[str] = []
    places: dict[tuple[str, int], tuple[list[int], int | None]] = {}
    for domain in DOMAINS:
        for label, name in enumerate(COMMON[domain]):
            common = list(range(len(rows), len(rows) + len(TEMPLATES)))
            rows += [template.format(name) for template in TEMPLATES]
            rare = len(rows) if domain in TASKS else None
            rows += [TEMPLATE.format(OFFICIAL[domain][label])] if domain in TASKS else []
            places[domain, label] = (common, rare)
    return rows, places


def contrastive_loss(logits: Tensor, caption_of: Tensor) -> Tensor:
    """CLIP's symmetric loss where equal captions within a batch count as one.

    Args:
        logits: of images and the batch's distinct captions `[B, U]`.
        caption_of: index `[B]` of each image's caption.
    """
    counts = torch.bincount(caption_of, minlength=logits.shape[1]).float()
    owners = F.one_hot(caption_of, logits.shape[1]).float()
    to_text = F.cross_entropy(logits + counts.log(), caption_of)
    to_image = -(owners * logits.log_softmax(0)).sum() / len(logits)
    return (to_text + to_image) / 2


def pretrain(data: dict[str, Data], seed: int, cycle: int, start: State | None) -> State:
    """A cycle of contrastive pretraining, from `start`, with a fresh caption at every step.

    All domains' images take part; rare names come at regular intervals. Token embeddings exist
    only for tokens of the captions while training.
    """
    steps, scale, shift, template_each = CYCLES[cycle]
    torch.manual_seed(seed)
    rng = np.random.default_rng((seed, cycle) if cycle else seed)
    rows, places = captions()
    used, tokens = torch.unique(tokenizer()(rows), return_inverse=True)  # the end stays largest
    model = build_model(len(used), scale)
    if start:
        mine = {name: tensor.float() for name, tensor in start.items()}
        mine["token_embedding.weight"] = mine["token_embedding.weight"][used]
        model.load_state_dict({**mine, "logit_scale": model.logit_scale})
    counts = {place: int(rng.integers(RARE)) for place in places}

    def caption(domain: str, label: int, template: int | None) -> int:
        common, rare = places[domain, label]
        counts[domain, label] += 1
        if rare is not None and counts[domain, label] % RARE == 0:
            return rare
        return common[int(rng.integers(len(common))) if template is None else template]

    def loss() -> Tensor:
        images, chosen_captions = [], []
        for domain, (pixels, labels) in data.items():
            chosen = torch.from_numpy(rng.integers(0, len(labels), 16))
            template = None if template_each else int(rng.integers(len(TEMPLATES)))
            images.append(augmented(pixels[chosen], shift, domain in MIRRORED, rng))
            chosen_captions += [caption(domain, n, template) for n in labels[chosen].tolist()]
        distinct, caption_of = torch.unique(torch.tensor(chosen_captions), return_inverse=True)
        features = model.encode_image(torch.cat(images), normalize=True)
        texts = model.encode_text(tokens[distinct], normalize=True)
        return contrastive_loss(math.exp(scale) * features @ texts.T, caption_of)

    train(loss, optimizers(model), steps, warmup=30, name=f"pretraining, cycle {cycle}")
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    embeddings = torch.zeros(TEXT["vocab_size"], TEXT["width"])  # zero for what no caption used
    embeddings[used] = state["token_embedding.weight"]
    return round_weights({**state, "token_embedding.weight": embeddings})


def head(model: open_clip.CLIP, names: list[str]) -> Tensor:
    """Zero-shot head `[C, D]` of class names, times the logit scale."""
    weights = open_clip.build_zero_shot_classifier(model, tokenizer(), names, [TEMPLATE.format])
    return model.logit_scale.exp().detach() * weights.T


def finetune(
    model: open_clip.CLIP, task: str, data: Data, seed: int, rate: float = FINETUNE_RATE
) -> State:
    """The weights of an image tower fine-tuned on one task with the task's head frozen."""
    weights = head(model, OFFICIAL[task])
    visual = copy.deepcopy(model.visual).train()
    rng = np.random.default_rng((seed, 1 + TASKS.index(task)))
    adam = torch.optim.AdamW(visual.parameters(), lr=rate, weight_decay=0.0)

    def loss() -> Tensor:
        chosen = torch.from_numpy(rng.integers(0, len(data[1]), 64))
        images = augmented(data[0][chosen], FINETUNE_SHIFT, task in MIRRORED, rng)
        features = F.normalize(visual(images), dim=-1)
        return F.cross_entropy(features @ weights.T, data[1][chosen])

    train(loss, [adam], FINETUNE_STEPS, warmup=20, name=f"expert {task}")
    return round_weights(visual.state_dict())


@torch.no_grad()
def accuracy(visual: nn.Module, state: State, weights: Tensor, data: Data) -> float:
    """Percentage of images that the tower with the weights of `state` classifies correctly."""
    state = {name: tensor.float() for name, tensor in state.items()}
    features = functional_call(visual.eval(), state, (normalised(data[0]),))
    return 100 * ((features @ weights.T).argmax(1) == data[1]).float().mean().item()
