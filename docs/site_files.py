"""A hook of mkdocs: pages may link to results, configurations and examples outside `docs/`.

In the repository `../benchmarks/results/x.md` and `../configs/x.yaml` are right; on the site the
same files stand under `results/`, `configs/` and `examples/`, and a link to a folder is its text
alone.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "results": ROOT / "benchmarks/results",
    "configs": ROOT / "configs",
    "examples": ROOT / "examples",
}
KINDS = ("*.md", "*.yaml", "*.png", "*.ipynb")
LINK = re.compile(r"\[([^\]]*)\]\(\.\./(?:benchmarks/)?((?:results|configs|examples)/[^)]*)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, folder in FOLDERS.items():
        for path in sorted(path for kind in KINDS for path in folder.glob(kind)):
            files.append(File.generated(config, f"{name}/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    return LINK.sub(lambda m: f"[{m[1]}]({m[2]})" if Path(m[2]).suffix else m[1], markdown)
