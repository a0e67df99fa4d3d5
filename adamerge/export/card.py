"""The model card of an exported folder: what it is, how to use it, how large it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adamerge.encoders.heads import Heads
from adamerge.export.folds import IMAGES
from adamerge.export.read import ADAPTERS, HEADS, OWN_WEIGHTS, task_folder

_WHAT = {
    "static": "One CLIP whose image tower merges the experts of {tasks}.",
    "per_task": "One CLIP per task, made of the experts of {tasks}:\nthe image tower of each is a "
    "merge of all, for images of its own task.",
    "dynamic": "An image tower whose MLPs are merged anew for every image, out of the experts of\n"
    "{tasks}, by routers that look at the image.",
    "adapters": "A merged image tower with small adapters for the images of each task:\n{tasks}.",
}


def card(record: Mapping[str, Any], heads: Heads, table: str) -> str:
    """The README.md of a folder.

    Args:
        record: the content of its `merge.json`.
        table: results in Markdown.
    """
    kind, method, tasks = record["kind"], record.get("method", ""), ", ".join(heads.tasks)
    library = "adamerge" if kind == "dynamic" else "open_clip"
    compared = "trained" if record.get("fold_is_exact", True) else "folded"
    files = "\n".join(f"| `{name}` | {size:,} |" for name, size in record["bytes"].items())
    title = f"{record.get('suite', 'merged')}: {len(heads.tasks)} experts merged by {method}"
    return f"""---
library_name: {library}
pipeline_tag: zero-shot-image-classification
tags: [model-merging, adamerge]
---

# {title}

{_WHAT[kind].format(tasks=tasks)}
What was learned was learned {"from" if record.get("labels") else "without"} labels by adamerge.
{_folded(record)}
```python
import adamerge
from PIL import Image

model = adamerge.load(".")  # this folder
model.classify([Image.open("picture.png")], task="{heads.tasks[0]}")  # [(class name, probability)]
```

{_elsewhere(record, heads)}

`{HEADS}` holds a classifier per task, `[classes, features]`, rows times the logit scale:
`logits = normalize(features) @ head.T`, plus the `bias of …` where there is one; class names are in
its metadata. `merge.json` holds the settings, inputs and versions; `coefficients.csv`, where
there is one, the merging coefficients.

| file | bytes |
|---|--:|
{files}
| all | {sum(record["bytes"].values()):,} |

{table}
Features read back from this folder differ from the {compared} model's by at most
{record["largest_relative_difference"]:.1e} of their norm.
"""


def _folded(record: Mapping[str, Any]) -> str:
    if not record.get("fold") or record.get("fold_is_exact", True):
        return ""
    what = "that task" if record["fold"] == "per_task" else "all tasks"
    return (
        f"The routers were replaced by their mean gates over unlabeled images of {what}, at most\n"
        f"{IMAGES} of each; the table has the accuracies before and after.\n"
    )


def _elsewhere(record: Mapping[str, Any], heads: Heads) -> str:
    """How, or why not, open_clip alone reads the folder."""
    kind, base = record["kind"], record.get("base", "static")
    kind = kind if base == "static" else base
    place = f"./{task_folder(heads.tasks[0])}" if kind == "per_task" else "."
    code = f"""```python
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:{place}")
tokenizer = open_clip.get_tokenizer("local-dir:{place}")
```"""
    if kind == "per_task":
        what = "The folder of every task is a whole CLIP that open_clip loads, with the pretrained"
        return f"{what} text tower:\n\n{code}"
    if kind == "dynamic":
        return (
            f"open_clip has no such tower and does not load this folder. `{OWN_WEIGHTS}` holds\n"
            "the routers, the MLPs' pretrained weights and task vectors, and the static rest; the\n"
            "text tower, which classification does not need, is left out."
        )
    if kind == "adapters":
        return (
            f"open_clip loads the encoder without the adapters of `{ADAPTERS}`, which gives\n"
            f"the merge before they were learned:\n\n{code}"
        )
    what = "open_clip loads this folder like any other; the text tower is the pretrained one"
    if record.get("config", {}).get("suite", {}).get("align"):
        what = (
            "The experts share no start and were aligned first. open_clip loads this folder like\n"
            "any other; the text tower is the first expert's"
        )
    return f"{what}:\n\n{code}"
