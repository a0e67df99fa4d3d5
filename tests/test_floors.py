"""A module imports only from lower floors (CONTRIBUTING.md, "The house")."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "adamerge"
FLOORS = {
    0: "errors files binding suite_check suite_files task_vectors storage mapped storage_kinds "
    "merging ahead fused fused_kernels fused_plan differences fast_paths shards gated losses "
    "objectives solving verdicts readings safe_pickle pickled torch_files weight_files "
    "layouts model_configs lora compat model_check config_check fitting pickled_modules "
    "matching kept",
    1: "towers mixtures adapters experts encoders heads transforms methods.base export_files "
    "loading",
    2: "methods.adamerging methods.surgery methods.wemoe",
    3: "step graphs shared adaptation compiled device_images advice features callbacks "
    "checkpoints hub data demo demo_images estimate evaluation export export_kinds folding "
    "model_card image_cache image_files image_source arrays labels local_files pictures "
    "preflight preflight_report recompute resume sources stores tracking sharding path_lists "
    "decoding processes",
    4: "config inputs build supplies inference init_text local_data survey task_names",
    5: "check convert deliver init run cli",
}
FLOOR = {name: floor for floor, names in FLOORS.items() for name in names.split()}
HEAVY = {"lightning", "omegaconf", "wandb", "datasets"}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def modules() -> dict[str, Path]:
    paths = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    return {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in paths}


def own_imports(path: Path) -> set[str]:
    names = {name.removeprefix("adamerge.") for name in imports(path)}
    return names & set(FLOOR)


def test_every_module_has_a_floor() -> None:
    assert set(modules()) == set(FLOOR)


def test_imports_run_one_way() -> None:
    wrong = []
    for name, path in modules().items():
        for other in own_imports(path):
            up = FLOOR[other] > FLOOR[name]
            between_methods = FLOOR[name] == FLOOR[other] == 2
            if up or between_methods:
                wrong.append(f"{name} (floor {FLOOR[name]}) imports {other} ({FLOOR[other]})")
    assert not wrong


def test_no_cycles() -> None:
    graph = {name: own_imports(path) - {name} for name, path in modules().items()}
    while graph:
        free = [name for name, needs in graph.items() if not needs & set(graph)]
        assert free, f"cycle among {sorted(graph)}"
        for name in free:
            del graph[name]


def test_lower_floors_know_nothing_of_the_machinery() -> None:
    for name, path in modules().items():
        if FLOOR[name] <= 2:
            assert not {found.partition(".")[0] for found in imports(path)} & HEAVY, name


def test_only_config_knows_omegaconf() -> None:
    users = {n for n, p in modules().items() if any("omegaconf" in i for i in imports(p))}
    assert users == {"config"}
