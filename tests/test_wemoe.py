"""Mixtures: the gated product against plain loops, memory, folds, sparse task vectors, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adamerge
from adamerge.encoders.tower import Tower, merged_encoder
from adamerge.learn.objectives import Entropy
from adamerge.learn.step import step_loss
from adamerge.methods import AdaMerging, WEMoE, gated
from adamerge.methods.gated import DenseDeltas, SparseDeltas, gated_linear, largest
from adamerge.methods.mixtures import DynamicEncoder
from tests import golden_data as golden
from tests import reference


def make(dtype: torch.dtype = torch.float64, **settings: Any) -> WEMoE:
    """With routers whose gates differ from image to image."""
    torch.manual_seed(0)
    method = WEMoE(golden.clip().backbone, golden.task_vectors(dtype), **settings)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return method


def draw(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64)


@pytest.mark.parametrize("at_once", [1, 2**20])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(("groups", "out", "columns"), [(5, 70, 9), (1, 32, 3), (2, 7, 40)])
def test_gated_linear_is_a_loop_over_images_and_tasks(
    groups: int, out: int, columns: int, sparse: bool, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gated, "_AT_ONCE", {"cpu": (at_once, at_once)})
    torch.manual_seed(0)
    weight, deltas = draw(out, columns), draw(3, out, columns)
    if sparse:
        deltas[deltas.abs() < 1] = 0
    hidden, gates, outer = draw(groups, 4, columns), draw(groups, 3), draw(groups, 4, out)
    results = []
    for function in (gated_linear, reference.gated_linear):
        h, g = hidden.clone().requires_grad_(), gates.clone().requires_grad_()
        form = deltas
        if function is gated_linear:
            form = SparseDeltas.of(deltas) if sparse else DenseDeltas(deltas)
        output = function(h, g, weight, form)
        output.backward(outer)
        results.append((output.detach(), h.grad, g.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_only_asked_gradients_are_computed() -> None:
    weight, deltas = draw(8, 4), DenseDeltas(draw(3, 8, 4))
    gates = draw(2, 3).requires_grad_()
    gated_linear(draw(2, 5, 4), gates, weight, deltas).sum().backward()
    hidden = draw(2, 5, 4).requires_grad_()
    gated_linear(hidden, gates.detach(), weight, deltas).sum().backward()
    assert gates.grad is not None and hidden.grad is not None


@pytest.mark.parametrize("density", [0.1, 0.35, 1.0])
def test_largest_keeps_what_exceeds_the_quantile(density: float) -> None:
    torch.manual_seed(0)
    deltas = draw(2, 7, 13)
    found = largest(deltas, density)
    for row, kept in zip(deltas, found, strict=True):
        expected = row if density == 1 else reference.largest(row, density)
        torch.testing.assert_close(kept, expected, rtol=0, atol=0)
        threshold = torch.quantile(row.abs(), 1 - density)
        assert density == 1 or torch.equal(kept, torch.where(row.abs() > threshold, row, 0))


def test_largest_counts_ties_as_not_exceeding() -> None:
    row = torch.tensor([[2.0, -1.0, 1.0, -1.0, 1.0]])
    assert torch.equal(largest(row, 0.25), torch.tensor([[2.0, 0, 0, 0, 0]]))
    assert torch.equal(largest(torch.ones(1, 5), 0.1), torch.zeros(1, 5))


def test_largest_of_more_numbers_than_torch_quantile_takes() -> None:
    count = 2**24 + 11
    values = torch.arange(count, dtype=torch.float64)[None]
    assert int((largest(values, 0.1) != 0).sum()) == count - 1 - int(0.9 * (count - 1))


def test_nothing_of_the_size_images_by_parameters_is_kept() -> None:
    method = make()
    images, ids = golden.batch(0)
    mlp = 2 * 32 * 128  # the two matrices of one MLP, each of 32 · 128
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features = method(images, ids)
    assert max(sizes.values()) < len(images) * mlp / 2
    # Not in many small pieces either: what is saved is what a static tower of this batch saves,
    # and the routers' share.
    assert sum(sizes.values()) < 2 * saved_by_adamerging()
    features.sum().backward()


def saved_by_adamerging() -> int:
    method = AdaMerging(golden.clip().backbone, golden.task_vectors())
    images, ids = golden.batch(0)
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        method(images, ids)
    return sum(sizes.values())


def test_a_sparse_mixture_takes_less_memory() -> None:
    def mlp_bytes(method: WEMoE) -> int:
        state = method.fold().state()  # type: ignore[operator]
        kept = [t for name, t in state.items() if "mlp.c_" in name and "weight_" in name]
        return sum(tensor.nbytes for tensor in kept)

    dense = mlp_bytes(make(torch.float32))
    sparse = mlp_bytes(make(torch.float32, density=0.1))
    assert dense == 4 * 3 * 2 * 2 * 32 * 128
    assert sparse < 0.22 * dense


@pytest.mark.parametrize("settings", [{}, {"shared_router": True, "density": 0.1}])
def test_one_image_at_a_time_equals_a_batch(settings: dict[str, Any]) -> None:
    method = make(**settings)
    images, ids = golden.batch(0)
    together = method(images, ids)
    for encoder in (method, method.fold()):
        alone = [encoder(images[i : i + 1], ids[i : i + 1]) for i in range(len(ids))]
        torch.testing.assert_close(torch.cat(alone), together)


@pytest.mark.parametrize("order", ["runs", "mixed", "unequal"])
def test_batch_gate_averages_over_each_tasks_images_while_training(order: str) -> None:
    method = make(batch_gate=True)
    images, ids = golden.batch(0)
    if order == "mixed":
        shuffled = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
        images, ids = images[shuffled], ids[shuffled]
    elif order == "unequal":
        images, ids = images[2:], ids[2:]
    features = method(images, ids)
    block = method._mixed.skeleton.transformer.resblocks[0].mlp
    seen: list[Tensor] = []
    handle = block.c_fc.register_forward_hook(lambda m, inputs, o: seen.append(inputs[1]))
    method(images, ids)
    handle.remove()
    gates = method.eval().gates(images)[:, 0]
    used = seen[0] if len(seen[0]) == len(ids) else seen[0].repeat_interleave(6, 0)
    for task in range(3):
        mean = gates[ids == task].mean(0)
        torch.testing.assert_close(used[ids == task], mean.expand(int((ids == task).sum()), -1))
    assert not torch.allclose(method(images, ids), features)  # every image by itself again


def test_batch_gate_and_micro_batches_exclude_each_other() -> None:
    images, ids = golden.batch(0)
    with pytest.raises(adamerge.AdamergeError, match=r"batch_gate.*set micro_batch to null"):
        step_loss(make(batch_gate=True), Entropy(golden.heads()), images, ids, 4)


def test_router_starts_at_init() -> None:
    torch.manual_seed(0)
    for layers in (0, 1, 2):
        method = WEMoE(golden.clip().backbone, golden.task_vectors(), router_layers=layers)
        images, _ = golden.batch(0)
        torch.testing.assert_close(
            method.gates(images), torch.full((18, 2, 3), 0.3).double(), rtol=0, atol=0.2
        )
    weights = torch.cat([router.fc1.weight.detach().flatten() for router in make_big().routers])
    assert abs(float(weights.std()) - 0.01) < 1e-4 and abs(float(weights.mean())) < 1e-4


def make_big() -> WEMoE:
    torch.manual_seed(0)
    config = {"image_size": 16, "patch_size": 8, "layers": 1, "width": 256, "head_width": 64}
    backbone = open_clip.CLIP(8, config, {"context_length": 4, "vocab_size": 8, "width": 8,
                                          "heads": 1, "layers": 1}).visual  # fmt: skip
    state = backbone.state_dict()
    expert = {name: tensor + 1 for name, tensor in state.items()}
    return WEMoE(backbone, adamerge.TaskVectors(state, {"one": expert}))


def test_without_layers_it_is_adamerging_with_coefficients_on_the_mlps() -> None:
    method = make(router_layers=0)
    names, table = method.coefficient_table() or ([], torch.empty(0))
    other = AdaMerging(golden.clip().backbone, golden.task_vectors())
    with torch.no_grad():
        for column, name in enumerate(golden.task_vectors().names):
            for block, gates in zip(names, table.T, strict=True):
                if name.startswith(f"{block}."):
                    other.coefficients[:, column] = gates
    images, ids = golden.batch(0)
    torch.testing.assert_close(method(images, ids), other(images, ids))
    folded = method.fold()
    assert not isinstance(folded, DynamicEncoder)
    torch.testing.assert_close(folded(images, ids), other(images, ids))
    assert make().coefficient_table() is None


@pytest.mark.parametrize("density", [1.0, 0.1])
def test_static_folds_are_exact_where_gates_do_not_vary(density: float) -> None:
    method = WEMoE(golden.clip().backbone, golden.task_vectors(), density=density)
    with torch.no_grad():
        for router in method.routers:
            router.fc2.weight.zero_()
            router.fc2.bias.normal_(0.3, 0.1)
    images, ids = golden.batch(0)
    per_task, overall = method.mean_gates([golden.batch(0), golden.batch(1)])
    assert per_task.shape == (3, 2, 3) and overall.shape == (2, 3)
    expected = method(images, ids)
    torch.testing.assert_close(method.fold_static(overall)(images), expected)
    torch.testing.assert_close(method.fold_per_task(per_task)(images, ids), expected)


def test_per_task_folds_take_their_own_tasks_mean_gates() -> None:
    method = make()
    batches = [golden.batch(step) for step in range(2)]
    per_task, overall = method.mean_gates(batches)
    images, ids = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    gates = method.gates(images)
    for task in range(3):
        torch.testing.assert_close(per_task[task], gates[ids == task].mean(0))
    torch.testing.assert_close(overall, gates.mean(0))
    torch.testing.assert_close(
        method.fold_per_task(per_task)(images[ids == 1], ids[ids == 1]),
        method.fold_static(per_task[1])(images[ids == 1]),
    )
    with pytest.raises(adamerge.AdamergeError, match=r"gates to fold have shape \[3, 2, 3\]"):
        method.fold_static(per_task)
    missing, _ = method.mean_gates([(images[ids < 2], ids[ids < 2])])
    with pytest.raises(adamerge.AdamergeError, match="at least one image of every task"):
        method.fold_per_task(missing)


def test_the_rest_comes_from_a_base() -> None:
    backbone, vectors = golden.clip().backbone, golden.task_vectors()
    base = merged_encoder(Tower(backbone), vectors, 0.7)
    torch.manual_seed(0)
    method = WEMoE(backbone, vectors, base=base, router_layers=0)
    full = torch.full((3, 32), 0.7, dtype=torch.float64)
    full[:, [i for i, name in enumerate(vectors.names) if ".mlp." in name]] = 0.3
    images, ids = golden.batch(0)
    expected = merged_encoder(Tower(backbone), vectors, full)(images)
    torch.testing.assert_close(method(images, ids), expected)
    with pytest.raises(adamerge.AdamergeError, match=r"base does not fit.*is nothing, expected"):
        WEMoE(backbone, vectors, base=nn.Linear(2, 2))


@pytest.mark.parametrize("settings", [{}, {"shared_router": True, "density": 0.1}])
def test_a_dynamic_encoder_is_made_again_from_its_saved_tensors(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    method = make(torch.float32, **settings)
    images, ids = golden.batch(0, torch.float32)
    folded = method.fold()
    assert isinstance(folded, DynamicEncoder)
    save_file(folded.state(), tmp_path / "encoder.safetensors")
    state = load_file(tmp_path / "encoder.safetensors")
    routers = [name for name in state if "fc1.weight" in name]
    assert len(routers) == len(method.routers)
    again = DynamicEncoder(Tower(golden.clip().backbone), state)
    assert torch.equal(again(images, ids), folded(images, ids))
    assert not any(parameter.requires_grad for parameter in again.parameters())


def test_autocast_keeps_gates_and_gradients_close() -> None:
    method = make(torch.float32)
    images, ids = golden.batch(0, torch.float32)
    results = []
    for enabled in (False, True):
        method.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            features = method(images, ids)
        features.float().square().sum().backward()
        grads = torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None])
        results.append((features.float(), grads))
        assert method.gates(images).dtype == torch.float32
    assert results[1][0].dtype == torch.float32
    for plain, low in zip(*results, strict=True):
        assert (low - plain).norm() < 0.05 * plain.norm()


def test_mistakes_are_named() -> None:
    backbone, vectors = golden.clip().backbone, golden.task_vectors()
    with pytest.raises(adamerge.AdamergeError, match=r"density is 0.*\(0, 1\]"):
        WEMoE(backbone, vectors, density=0)
    with pytest.raises(adamerge.AdamergeError, match="density is 'x', expected a number"):
        WEMoE(backbone, vectors, density="x")  # type: ignore[arg-type]
    with pytest.raises(adamerge.AdamergeError, match="router_layers is 3: expected 0, 1 or 2"):
        WEMoE(backbone, vectors, router_layers=3)  # type: ignore[arg-type]
    plain = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    state = plain.state_dict()
    other = {name: tensor + 1 for name, tensor in state.items()}
    with pytest.raises(adamerge.AdamergeError, match=r"no blocks transformer\.resblocks"):
        WEMoE(plain, adamerge.TaskVectors(state, {"one": other}))


def test_an_mlp_with_other_layers_is_refused() -> None:
    backbone = open_clip.transformer.VisionTransformer(16, 8, 32, 1, 2, 4.0, output_dim=8)
    backbone.transformer.resblocks[0].mlp.append(nn.LayerNorm(32))
    state = backbone.state_dict()
    other = {name: tensor + 1 for name, tensor in state.items()}
    with pytest.raises(adamerge.AdamergeError, match=r"resblocks\.0\.mlp\.3 .* is a LayerNorm"):
        WEMoE(backbone, adamerge.TaskVectors(state, {"one": other}))


@pytest.mark.parametrize("density", [1.0, 0.5])
def test_mlp_tensors_that_no_expert_changed_are_static(density: float) -> None:
    """As of LoRA adapters on the first linear layers alone."""
    clip, pretrained = golden.clip(), golden.state("pretrained", torch.float64)
    experts = {task: golden.state(f"expert_{task}", torch.float64) for task in golden.TASKS}
    kept = ("mlp.c_proj.weight", "mlp.c_proj.bias", "0.mlp.c_fc.bias", "ln_1.weight")
    for state in experts.values():
        state.update({name: pretrained[name] for name in state if name.endswith(kept)})
    vectors = adamerge.TaskVectors(pretrained, experts)
    assert len(vectors.constants) == 2 + 2 + 1 + 2
    torch.manual_seed(0)
    method = WEMoE(clip.backbone, vectors, density=density)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    images, ids = draw(4, 3, 16, 16), torch.zeros(4, dtype=torch.long)
    features, gates = method(images, ids), method.gates(images)
    for row in range(4):  # each image's own gates, folded into a plain tower
        static = method.fold_static(gates[row])
        torch.testing.assert_close(static(images[row : row + 1])[0], features[row])
    torch.testing.assert_close(method.fold()(images), features)
    assert gates.std(0).min() > 1e-4


def test_experts_without_mlps_of_their_own_are_refused() -> None:
    clip, pretrained = golden.clip(), golden.state("pretrained", torch.float64)
    experts = {task: golden.state(f"expert_{task}", torch.float64) for task in golden.TASKS}
    for state in experts.values():
        state.update({name: pretrained[name] for name in state if ".mlp." in name})
    with pytest.raises(adamerge.AdamergeError, match="no expert changed an MLP of the tower"):
        WEMoE(clip.backbone, adamerge.TaskVectors(pretrained, experts))


def test_batches_and_settings_that_mean_nothing() -> None:
    method = make()
    for images, ids in ((0, 0), (3, 2)):
        with pytest.raises(adamerge.AdamergeError, match="expected at least one image, and one"):
            method(draw(images, 3, 16, 16), torch.zeros(ids, dtype=torch.long))
    with pytest.raises(adamerge.AdamergeError, match="init is nan, expected a number"):
        WEMoE(golden.clip().backbone, golden.task_vectors(), init=float("nan"))
