"""Label-free losses as pure functions of logits, in nats."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def sample_entropy(logits: Tensor) -> Tensor:
    """Shannon entropy of each prediction, `[B, C] -> [B]`, exact (log-softmax), in nats.

    Half-precision logits are promoted to float32 first.

    >>> sample_entropy(torch.zeros(1, 2))  # ln 2
    tensor([0.6931])
    """
    log_probabilities = _log_softmax(logits)
    return -(log_probabilities.exp() * log_probabilities).sum(-1)


def entropy(logits: Tensor) -> Tensor:
    """Mean prediction entropy of a batch, `[B, C] -> []`, in nats.

    The objective of AdaMerging: Adaptive Model Merging for Multi-Task Learning (arXiv 2310.02575).

    >>> entropy(torch.tensor([[0.0, 0.0], [99.0, 0.0]]))
    tensor(0.3466)
    """
    return sample_entropy(logits).mean()


def marginal_entropy(logits: Tensor) -> Tensor:
    """Entropy of the batch's mean prediction, `[B, C] -> []`, in nats.

    Under torch.distributed the mean is taken over all ranks (equal batches on each), while the
    gradient is this rank's share, so that averaging gradients over ranks gives the whole one.
    A mean over n images underestimates the entropy by up to about (C − 1) / 2n nats: with few
    images per class the marginal is biased, the same way at every step.
    """
    mean = promote(logits).softmax(-1).mean(0)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        everywhere = mean.detach().clone()
        dist.all_reduce(everywhere)
        mean = everywhere / dist.get_world_size() + (mean - mean.detach())
    return -torch.special.xlogy(mean, mean.clamp_min(torch.finfo(mean.dtype).tiny)).sum()


def infomax(logits: Tensor) -> Tensor:
    """Mean entropy minus entropy of the mean prediction, `[B, C] -> []`, in nats.

    The information-maximisation loss of Do We Really Need to Access the Source Data? (SHOT, arXiv
    2002.08546): predictions are to be certain one by one and diverse together, which forbids the
    collapse onto few classes that entropy alone rewards.

    >>> infomax(torch.tensor([[99.0, 0.0], [0.0, 99.0]]))
    tensor(-0.6931)
    """
    return entropy(logits) - marginal_entropy(logits)


def expert_kl(logits: Tensor, expert_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean KL divergence from the expert's predictions to the model's, `[B, C], [B, C] -> []`.

    `temperature² · mean Σ_c p_c (log p_c − log q_c)` with p and q the softmax of the logits divided
    by `temperature`: Distilling the Knowledge in a Neural Network (arXiv 1503.02531), whose factor
    keeps gradients of one size. In nats. Half-precision logits are promoted to float32.

    >>> expert_kl(torch.tensor([[0.0, 0.0]]), torch.tensor([[99.0, 0.0]]))
    tensor(0.6931)
    """
    wanted = _log_softmax(promote(expert_logits) / temperature)
    found = _log_softmax(promote(logits) / temperature)
    return temperature**2 * (wanted.exp() * (wanted - found)).sum(-1).mean()


def expert_labels(logits: Tensor, expert_logits: Tensor, sure: bool = False) -> Tensor:
    """Mean cross-entropy to the class that the expert predicts, `[B, C], [B, C] -> []`, in nats.

    With `sure`, the mean over the images that SyMerge keeps (arXiv 2412.19098): those where both
    predict one class, or where the expert's greatest probability is at least the model's. Where
    none is kept it is 0, with gradient 0. Half-precision logits are promoted to float32.

    >>> expert_labels(torch.zeros(1, 4), torch.tensor([[9.0, 0, 0, 0]])).exp()
    tensor(4.)
    """
    found, wanted = promote(logits), promote(expert_logits)
    classes = wanted.argmax(-1)
    each = torch.nn.functional.cross_entropy(found, classes, reduction="none")
    if not sure:
        return each.mean()
    with torch.no_grad():
        surer = wanted.softmax(-1).amax(-1) >= found.softmax(-1).amax(-1)
        kept = surer | (found.argmax(-1) == classes)
    return torch.where(kept, each, 0).sum() / kept.sum().clamp_min(1)


def _log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities; of classes that logits of minus infinity rule out the least finite number,
    so that they count 0 where they are multiplied by their probability, not NaN."""
    found = promote(logits).log_softmax(-1)
    return found.clamp_min(torch.finfo(found.dtype).min)


def promote(tensor: Tensor) -> Tensor:
    """To float32, if it is not float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
