"""Batches: stateless, disjoint over ranks, without labels. The cache: exact, keyed, honest."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from adamerge import AdamergeError
from adamerge.encoders.clip import Normalizer
from adamerge.images.batches import Stream, refuse_too_large
from adamerge.images.cache import TaskImages, cache_images
from adamerge.images.sources import open_dataset
from adamerge.learn.data import TaskData
from tests import tiny

CFG = open_clip.transform.PreprocessCfg(
    size=16, mean=tuple(tiny.PREPROCESS["mean"]), std=tuple(tiny.PREPROCESS["std"])
)


def cached(tmp_path: Path, dataset: datasets.Dataset, **options: Any) -> TaskImages:
    classes = tuple(tiny.CLASSES["dots"])
    return cache_images("dots", dataset, classes, CFG, tmp_path, **options)


def stream(size: int = 10, batch: int = 4, **options: int) -> Stream:
    return Stream("t", np.arange(100, 100 + size), seed=3, batch_size=batch, **options)


def test_a_batch_depends_only_on_seed_task_rank_and_step() -> None:
    forward = [stream().batch(step) for step in range(8)]
    one = stream()
    backward = [one.batch(step) for step in reversed(range(8))][::-1]
    np.testing.assert_array_equal(forward, backward)
    assert not np.array_equal(stream().batch(0), Stream("u", one.rows, 3, 4).batch(0))
    assert not np.array_equal(stream().batch(0), Stream("t", one.rows, 4, 4).batch(0))


def test_every_epoch_visits_every_image_once_in_a_new_order() -> None:
    draws = np.concatenate([stream().batch(step) for step in range(5)])  # two epochs of ten
    assert sorted(draws[:10]) == sorted(draws[10:]) == list(range(100, 110))
    assert not np.array_equal(draws[:10], draws[10:])


def test_batches_larger_than_the_data_set() -> None:
    assert sorted(stream(size=3, batch=6).batch(0)) == [100, 100, 101, 101, 102, 102]


def test_ranks_together_see_what_one_process_sees() -> None:
    for step in range(4):
        ranks = [stream(batch=2, rank=rank, ranks=2).batch(step) for rank in (0, 1)]
        np.testing.assert_array_equal(np.concatenate(ranks), stream(batch=4).batch(step))


def numbered(labels: np.ndarray | None) -> TaskData:
    images = np.arange(20, dtype=np.uint8)[:, None, None, None] * np.ones((3, 2, 2), np.uint8)
    return TaskData({"t": TaskImages(images, labels, "key", 0)}, batch_size=4, seed=1)


def test_batches_hold_images_alone_and_ignore_labels() -> None:
    shuffled = np.random.default_rng(0).integers(0, 9, 20)
    for first_step in (0, 7):
        batches = [
            next(iter(numbered(labels).batches(first_step)))
            for labels in (np.arange(20), shuffled, None)
        ]
        for batch in batches:
            assert set(batch) == {"t"} and batch["t"].dtype == torch.uint8
            assert torch.equal(batch["t"], batches[0]["t"])


def test_workers_keep_the_order_of_steps() -> None:
    data = numbered(None)
    plain = iter(data.batches(3))
    loader = torch.utils.data.DataLoader(data.batches(3), batch_size=None, num_workers=2)
    for expected, found, _ in zip(plain, loader, range(5), strict=False):
        assert torch.equal(expected["t"], found["t"])


def test_started_workers_get_the_path_of_mapped_images(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (200, 3, 32, 32), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    for given, small in ((mapped, True), (mapped[50:], False), (images, False)):
        batches = TaskData({"t": TaskImages(given, None, "key", 0)}, 4, 1).batches()
        content = pickle.dumps(batches)
        assert (len(content) < 10_000) is small
        again = pickle.loads(content)
        for expected, found, _ in zip(batches, again, range(3), strict=False):
            assert torch.equal(expected["t"], found["t"])


@pytest.mark.parametrize("protocol", ["paper", "heldout"])
def test_images_on_the_device_are_the_same_batches(protocol: str) -> None:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (2100, 3, 4, 4), dtype=np.uint8)
    data = TaskData({"t": TaskImages(images, None, "key", 0)}, 16, 1, protocol)
    device = torch.device("cpu")
    kept = data.batches(3, device=device)
    for expected, found, _ in zip(data.batches(3), kept, range(300), strict=False):
        assert torch.equal(expected["t"], found["t"]) and found["t"].dtype == torch.uint8
    held = data.held(device)
    needed = len(data.adapt_rows["t"]) * 3 * 4 * 4
    assert held["t"].nbytes == needed and len(held["t"]) == 2100
    refuse_too_large(held, device, needed)
    refuse_too_large(held, device, None)
    with pytest.raises(AdamergeError, match=r"images_on_device: the images take .* cpu has .* set"):
        refuse_too_large(held, device, needed - 1)


def test_heldout_halves_are_disjoint_and_do_not_depend_on_the_seed() -> None:
    images = np.zeros((21, 3, 2, 2), np.uint8)
    tasks = {"t": TaskImages(images, np.zeros(21, np.int64), "key", 0)}
    one, other = (TaskData(tasks, seed=seed, protocol="heldout") for seed in (0, 1))
    adapt, score = one.adapt_rows["t"], one.score_rows["t"]
    assert sorted([*adapt, *score]) == list(range(21)) and not set(adapt) & set(score)
    np.testing.assert_array_equal(score, other.score_rows["t"])
    assert set(np.concatenate([Stream("t", adapt, 0, 5).batch(s) for s in range(4)])) == set(adapt)
    paper = TaskData(tasks)
    np.testing.assert_array_equal(paper.adapt_rows["t"], paper.score_rows["t"])
    with pytest.raises(AdamergeError, match="protocol is 'half': expected one of paper, heldout"):
        TaskData(tasks, protocol="half")


def test_cache_and_normalizer_equal_the_open_clip_transform(tmp_path: Path) -> None:
    dataset = tiny.images("dots")
    found = cached(tmp_path, dataset)
    transform = open_clip.transform.image_transform_v2(CFG, is_train=False)
    expected = torch.stack([transform(image) for image in dataset["image"]])
    normalizer = Normalizer(CFG.mean, CFG.std)
    torch.testing.assert_close(
        normalizer(torch.from_numpy(np.array(found.images))), expected, rtol=0, atol=1e-6
    )
    np.testing.assert_array_equal(found.labels, dataset["label"][:])


def test_cache_is_reused_and_keyed_by_content_and_transform(tmp_path: Path) -> None:
    def folders() -> list[Path]:
        return sorted((tmp_path / "images").iterdir())

    first = cached(tmp_path, tiny.images("dots"))
    (folder,) = folders()
    before = (folder / "images.npy").stat().st_mtime_ns
    assert cached(tmp_path, tiny.images("dots")).key == first.key
    assert folders() == [folder] and (folder / "images.npy").stat().st_mtime_ns == before
    assert cached(tmp_path, tiny.images("dots", 39)).key != first.key
    other = open_clip.transform.PreprocessCfg(size=12)
    classes = tuple(tiny.CLASSES["dots"])
    assert cache_images("dots", tiny.images("dots"), classes, other, tmp_path).key != first.key
    assert len(folders()) == 3


def test_an_image_overwritten_in_place_is_read_again(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    features = datasets.Features(image=datasets.Image())
    found = []
    for colour in ("red", "blue"):
        Image.new("RGB", (16, 16), colour).save(picture)
        dataset = datasets.Dataset.from_dict({"image": [str(picture)]}, features=features)
        found.append(cached(tmp_path / "cache", dataset).images[0, :, 0, 0].tolist())
    assert found == [[255, 0, 0], [0, 0, 255]]


def test_a_folder_of_images_with_splits(tmp_path: Path) -> None:
    for split, colour in (("train", "red"), ("test", "green")):
        (tmp_path / split).mkdir()
        Image.new("RGB", (16, 16), colour).save(tmp_path / split / "a.png")
    image = open_dataset("t", {"path": str(tmp_path), "split": "test"})[0]["image"]
    assert image.getpixel((0, 0)) == (0, 128, 0)
    with pytest.raises(AdamergeError, match=r"no folder .* for split 'val'"):
        open_dataset("t", {"path": str(tmp_path), "split": "val"})


def with_broken_image(tmp_path: Path) -> datasets.Dataset:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, image in enumerate(tiny.images("dots", 5)["image"]):
        image.save(folder / f"{index}.png")
    (folder / "3.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    return open_dataset("dots", {"path": str(folder)})


def test_broken_images_are_named_or_skipped_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = with_broken_image(tmp_path)
    with pytest.raises(AdamergeError, match=r"image 3 of task 'dots' cannot be decoded .*3\.png"):
        cached(tmp_path / "cache", dataset)
    found = cached(tmp_path / "cache", dataset, on_bad_image="skip")
    assert len(found.images) == 4 and found.skipped == 1 and found.labels is None
    assert "1 broken images were skipped" in caplog.text


def test_grey_and_transparent_images_become_rgb(tmp_path: Path) -> None:
    pictures = [Image.new(mode, (16, 16)) for mode in ("L", "RGBA", "P", "1")]
    features = datasets.Features(image=datasets.Image())
    dataset = datasets.Dataset.from_dict({"image": pictures}, features=features)
    assert cached(tmp_path, dataset).images.shape == (4, 3, 16, 16)


def test_data_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    dataset = tiny.images("stripes")  # three classes; the head of dots has four
    with pytest.raises(AdamergeError, match=r"head of task 'dots' has 4 classes, .* has 3"):
        cached(tmp_path, dataset)
    plain = dataset.cast_column("label", datasets.Value("int64"))
    high = plain.map(lambda row: {"label": row["label"] + 2})
    with pytest.raises(AdamergeError, match="run from 2 to 4, but its head has 4 classes"):
        cached(tmp_path, high)
    with pytest.raises(AdamergeError, match="is empty"):
        cached(tmp_path, tiny.images("dots").select([]))
    with pytest.raises(AdamergeError, match="no label column 'lable': its columns are image"):
        cached(tmp_path, tiny.images("dots"), label="lable", labelled=True)
    floats = dataset.cast_column("label", datasets.Value("float32"))
    halves = floats.map(lambda row: {"label": row["label"] + 0.5})
    with pytest.raises(AdamergeError, match="are not class numbers: expected integers"):
        cached(tmp_path, halves)
    with pytest.raises(AdamergeError, match="no image column 'picture': its columns are image"):
        cached(tmp_path, tiny.images("dots"), image="picture")


def test_sources(tmp_path: Path) -> None:
    with pytest.raises(
        AdamergeError, match=r"tasks\.t\.data\.path: no such file or folder .*nowhere"
    ):
        open_dataset("t", {"path": str(tmp_path / "nowhere")})
    with pytest.raises(AdamergeError, match=r"data\.spilt is unknown \(did you mean 'split'\?\)"):
        open_dataset("t", {"path": "x", "spilt": "test"})
    with pytest.raises(AdamergeError, match=r"'os\.system' is not a function annotated to return"):
        open_dataset("t", {"_target_": "os.system", "command": "true"})
    target = {"_target_": "tests.tiny.images", "task": "dots", "count": 7}
    assert len(open_dataset("t", target)) == 7
    with pytest.raises(AdamergeError, match=r"data\.cuont is unknown \(did you mean 'count'\?\)"):
        open_dataset("t", {**target, "cuont": 1})
