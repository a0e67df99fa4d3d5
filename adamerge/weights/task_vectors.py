"""Task vectors: what the experts know, frozen, and the merge of them with coefficients."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from adamerge._base.errors import AdamergeError
from adamerge.weights.differences import Model, StateDict, Where, not_the_last, other_layers
from adamerge.weights.disk import MappedLayers, storing
from adamerge.weights.merging import Merge, neighbours
from adamerge.weights.prefetch import Prefetcher
from adamerge.weights.reading import Contents, finite_squares, read, read_file
from adamerge.weights.storage import Dense, Layer, Storage, keep


class TaskVectors:
    """The pretrained weights θ0 and the task vectors τ_t = θ_t − θ0 of T experts of any network.

    Editing Models with Task Arithmetic (arXiv 2212.04089). A *layer* is one tensor; layers keep the
    order of `pretrained`. Everything is computed in float32 (float64 where `pretrained` is
    float64), and stored so unless `storage` says otherwise; half-precision inputs are promoted, and
    a log line says so. Integer entries (batch-norm counters) and tensors that no expert changed (a
    projection the experts do not have, what LoRA leaves alone) are constants, taken from the
    pretrained weights, and are not layers. Nor are floating-point buffers (batch-norm statistics):
    whatever the coefficients, a merge has the mean of the experts'.

    Experts are never instantiated: one layer of all of them is in memory at a time, beside what is
    stored.

    Not an `nn.Module` on purpose: task vectors must appear in no checkpoint and no DDP broadcast.

    >>> start, a, b = ({"w": torch.tensor(w)} for w in ([1.0, 1.0], [3.0, 1.0], [1.0, 5.0]))
    >>> vectors = TaskVectors(start, {"a": a, "b": b})
    >>> vectors.combine(torch.tensor([0.5, 0.5]))["w"]
    tensor([2., 3.])

    Args:
        pretrained: a module, or its state dict (any mapping; each tensor is read once).
        experts: modules or state dicts by task name (a mapping, or pairs in order).
        sources: where each input came from (`"pretrained"` or a task -> file), for error messages.
        share: keep the pretrained tensors themselves, not copies, where their type is the right
            one: one model less in memory, if nothing changes them afterwards.
        storage: in which type and place τ is kept.
        buffers: names that are no parameters, beside those of batch norm, which are known, and
            those that a module tells.
        start: the task whose expert the pretrained model itself is, where networks of different
            starts were aligned with one of them: its τ alone may be zero.

    Attributes:
        tasks: the T task names, in order.
        names: the L layer names, in order.
        pretrained: layer name -> tensor.
        layers: layer name -> τ as it is kept.
        constants: name -> tensor of what is no layer, as every merge has it.
        buffers: name -> the pretrained model's and each expert's, `[1 + T, *shape]`.
        promoted: half-precision type -> the inputs (`pretrained`, task names) stored in it.
        per_task: whether task t's encoder is θ0 + λ_t τ_t alone, and not the sum over tasks (set
            by transforms that make an encoder of its own for every task).

    Raises:
        AdamergeError: a missing, extra, mis-shaped or non-finite tensor, a duplicate task, an
            expert identical to the pretrained weights, or no expert or layer at all.
    """

    tasks: tuple[str, ...]
    names: tuple[str, ...]
    pretrained: dict[str, Tensor]
    layers: Mapping[str, Layer]
    constants: dict[str, Tensor]
    buffers: dict[str, Tensor]
    promoted: dict[str, list[str]]
    storage: Storage
    per_task: bool = False
    _norms: Tensor
    _ahead: Prefetcher | None = None
    _groups: list[tuple[str, ...]] | None = None
    _home: weakref.ref[TaskVectors] | None = None  # where these were moved from

    def __init__(
        self,
        pretrained: Model,
        experts: Mapping[str, Model] | Iterable[tuple[str, Model]],
        *,
        sources: Mapping[str, str] | None = None,
        share: bool = False,
        storage: Storage | None = None,
        buffers: Collection[str] = (),
        start: str | None = None,
    ) -> None:
        pairs = list(experts.items() if isinstance(experts, Mapping) else experts)
        storage, where = storage or Storage(), Where(sources or {})
        self._hold(read(pretrained, pairs, buffers, share, storage, where, start), storage)

    def _hold(self, contents: Contents, storage: Storage) -> None:
        self.tasks, self.names = contents.tasks, tuple(contents.pretrained)
        self.pretrained, self.layers = contents.pretrained, contents.layers
        self.constants, self.buffers = contents.constants, contents.buffers
        self.promoted, self._norms, self.storage = contents.promoted, contents.lengths, storage

    @classmethod
    def mapped(
        cls,
        pretrained: StateDict,
        storage: Storage,
        experts: Mapping[str, StateDict] | None = None,
        buffers: Collection[str] = (),
    ) -> TaskVectors:
        """Those that another object left in `storage.file`, with the same pretrained weights.

        Args:
            pretrained: shared, not copied, where they are float32 or float64.
            experts: of a model with buffers, which are not in the file.
            buffers: as of the constructor.

        Raises:
            AdamergeError: no such file, a damaged one, or one of another model.
        """
        other = object.__new__(cls)
        other._hold(read_file(pretrained, storage, list((experts or {}).items()), buffers), storage)
        return other

    @property
    def deltas(self) -> Mapping[str, Tensor]:
        """Layer name -> τ `[T, *shape]` in the type and on the device of `pretrained`.

        What is stored in another type or place is brought there when it is asked for.
        """
        return Dense(self.layers, self.pretrained)

    def combine(self, coefficients: Tensor, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Merged weights `W_l = θ0_l + Σ_t λ[t, l] τ[t, l]`, differentiable in `coefficients`.

        One pass over the task vectors here and one more in the backward pass, whatever the number
        of images and losses in between; nothing the size of the model is kept for the backward.

        Args:
            coefficients: merging coefficients λ, `[T]` (task-wise) or `[T, L]` (layer-wise), on
                the device of the pretrained weights. Cast to their dtype for the arithmetic.
            dtype: of the merged matrices, rounded once after the sum; None: that of the pretrained
                weights, as vectors (biases, normalisations) always. Autocast does not apply.

        Returns:
            layer name -> tensor.
        """
        expected = (len(self.tasks), len(self.names))
        if coefficients.shape == expected[:1]:
            coefficients = coefficients[:, None].expand(-1, expected[1])
        if coefficients.shape != expected:
            raise AdamergeError(
                f"coefficients have shape {list(coefficients.shape)}: expected [{expected[0]}] or "
                f"{list(expected)} ([tasks] or [tasks, layers])"
            )
        return dict(zip(self.names, self._merged(coefficients, dtype), strict=True))

    def _merged(self, coefficients: Tensor, dtype: torch.dtype | None) -> Iterator[Tensor]:
        """The layers' merged tensors, `[T, L]` coefficients given; a group after the other."""
        columns = coefficients.split([len(group) for group in self.groups], dim=1)
        for index, part in enumerate(columns):
            yield from Merge.apply(part, self, index, dtype)

    @property
    def groups(self) -> list[tuple[str, ...]]:
        """Neighbouring layers that are merged together: as many as are no larger than the largest
        layer (or a million numbers), or on a GPU that holds them all, all."""
        if self._groups is None:
            at_once = not self.storage.stays and self.device.type == "cuda"
            self._groups = [self.names] if at_once else neighbours(self.pretrained)
        return self._groups

    def bases(self, group: int) -> list[Tensor]:
        """θ0 of a group's layers."""
        return [self.pretrained[name] for name in self.groups[group]]

    def bring(self, group: int, then: int) -> list[Layer]:
        """τ of a group's layers on the device that computes; `then` will be asked for next."""
        groups = self.groups
        if self.storage.stays and self.device.type == "cuda":
            self._ahead = self._ahead or Prefetcher(self.layers, groups, self.device)
            return self._ahead.bring(group, then)
        if isinstance(self.layers, MappedLayers) and 0 <= then < len(groups):
            self.layers.expect(list(groups[then]))
        return [self.layers[name] for name in groups[group]]

    @property
    def device(self) -> torch.device:
        """Where merged weights are computed: that of the pretrained weights."""
        return self.pretrained[self.names[0]].device

    @property
    def whole(self) -> TaskVectors:
        """All of the task vectors, where this object holds a part of them: here, itself."""
        return self

    def expert(self, task: str) -> dict[str, Tensor]:
        """The weights θ0 + τ_t of one expert (equal to its file's up to one rounding), and its
        buffers."""
        row = self.index(task)
        layers = {
            name: base + self.layers[name].row(row, base) for name, base in self.pretrained.items()
        }
        return layers | {name: values[1 + row] for name, values in self.buffers.items()}

    def index(self, task: str) -> int:
        """The row of `task`. Raises AdamergeError for a task that is not here."""
        if task not in self.tasks:
            raise AdamergeError(f"no task {task!r} here: the tasks are {', '.join(self.tasks)}")
        return self.tasks.index(task)

    def stored(self, storage: Storage) -> TaskVectors:
        """The same task vectors in another type or place; themselves where it is that already."""
        if (storage.dtype, storage.device) == (self.storage.dtype, self.storage.device):
            return self
        return self.with_deltas(self.deltas, storage)

    def with_deltas(
        self,
        deltas: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
        storage: Storage | None = None,
    ) -> TaskVectors:
        """The same tasks and (shared) pretrained weights with other deltas: for transforms.

        Args:
            deltas: layer name -> `[T, *shape]` (a mapping, or pairs), taken one at a time.
            storage: in which type and place they are kept; None: as these.

        Raises:
            AdamergeError: deltas of other layers, or with NaN or infinite values; these here make
                an encoder of its own for every task, and `storage` is None.
        """
        if self.per_task and storage is None:
            raise not_the_last()
        other = copy.copy(self)
        other.storage = storage or self.storage
        other._ahead = other._groups = other._home = None
        other._norms = torch.zeros(len(self.tasks), dtype=torch.float64)
        with storing(other.storage, list(self.names), named=False) as shelf:
            for name, changed in deltas.items() if isinstance(deltas, Mapping) else deltas:
                other._norms += finite_squares(changed, name)
                shelf.add(name, keep(changed, other.storage.dtype))
            other._norms = other._norms.sqrt()
            other.layers = shelf.close({})
        if set(other.layers) != set(self.names):
            raise other_layers(set(self.names) ^ set(other.layers))
        return other

    def apply(self, fn: Callable[[Tensor], Tensor]) -> TaskVectors:
        """A copy with every tensor mapped (to a device or dtype); what `fn` keeps is shared.

        τ that is stored in a place of its own stays there, and τ in a smaller type keeps it. Task
        vectors that come back to where they were moved from are those themselves, if they are
        still there.
        """
        first = self.pretrained[self.names[0]]
        moved, home = fn(first), None if self._home is None else self._home()
        if home is not None and home._is_like(moved):
            return home
        other = copy.copy(self)
        other._ahead = other._groups = None
        other.pretrained = {name: fn(tensor) for name, tensor in self.pretrained.items()}
        other.constants = {name: fn(tensor) for name, tensor in self.constants.items()}
        other.buffers = {name: fn(tensor) for name, tensor in self.buffers.items()}
        if not self.storage.stays:
            other.layers = {
                name: layer.moved(fn, self.pretrained[name], moved.device)
                for name, layer in self.layers.items()
            }
        other._home = weakref.ref(self) if moved.device != first.device else self._home
        return other

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to this process: where it was moved from, copies under way."""
        return self.__dict__ | {"_home": None, "_ahead": None}

    def _is_like(self, moved: Tensor) -> bool:
        first = self.pretrained[self.names[0]]
        return (first.device, first.dtype) == (moved.device, moved.dtype)

    def norms(self) -> Tensor:
        """Euclidean norm of each task vector over all layers as it was computed, `[T]`, float64."""
        return self._norms.clone()

    def numel(self) -> int:
        """P, the number of parameters of one model (all layers)."""
        return sum(tensor.numel() for tensor in self.pretrained.values())

    def nbytes(self) -> int:
        """Bytes that τ takes of the memory of the device that computes: all of it, or the largest
        group of layers where it comes from a file, and two of them where it comes to a GPU."""
        sizes = {name: layer.nbytes for name, layer in self.layers.items()}
        on_gpu = self.device.type == "cuda"
        if self.storage.device == "disk" or (self.storage.stays and on_gpu):
            largest = max(sum(sizes[name] for name in group) for group in self.groups)
            return 2 * largest if on_gpu else largest
        return sum(sizes.values())
