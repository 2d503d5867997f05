"""Train the experiments of a notebook's section 10 and store them, for the tables on the page.

    LAB_DATASET=… python tests/experiments.py cifar|mnist [--seeds N] [--names "name,name"] [--rows "row,row"]

The variants, the training and the settings are the page's own: its definitions are executed, and then each cell that
calls `experiment`. CIFAR.ipynb has one more, "recipe", the ablation in its optional part: each of its `--rows`
is trained by the page's `train_row`, with the sizes of RECIPE. Accuracies are on images held out of the training set;
the test set is not read. Each experiment is stored as soon as it is there, the recipe after each training. What is not
named, an experiment or a row of the recipe, keeps what was stored.
"""

import argparse
import json
import os
import sys
import time
import unittest.mock
from pathlib import Path

import torch
import torchvision

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import helpers
import notebooks

RECIPE = {"widths": (32, 64, 128), "epochs": 6, "batch_size": 250, "train": 10_000}
RECIPE_HELD_OUT = 5_000
SMOKE = {"widths": (8, 16, 16), "epochs": 1, "batch_size": 100, "train": 200}


def main() -> None:
    """Parse the command line, train, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lab", choices=("mnist", "cifar"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--names", default="", help="names, with commas; default: all")
    parser.add_argument("--rows", default="", help="rows of the recipe, with commas; default: all")
    parser.add_argument("--store", type=Path)
    arguments = parser.parse_args()
    store = arguments.store or helpers.HERE / "runs" / "reference" / arguments.lab / "experiments.json"

    notebook = f"{arguments.lab.upper()}.ipynb"
    page = notebooks.page(notebook, EXPERIMENTS="all", EXPERIMENT_SEEDS=arguments.seeds)
    cells = notebooks.experiment_cells(notebook)
    known = ["recipe"] * ("recipe_rows" in page) + list(cells)
    names = chosen("experiment", arguments.names, known)
    helpers.reuse_memory()
    data = helpers.load(page["DATASET"], train=True, shape=(1, 28, 28) if arguments.lab == "mnist" else (3, 32, 32))
    device = helpers.pick_device(page["DEVICE"])
    page["train_part"], page["validation_part"] = helpers.hold_out(data, page["VALIDATION"], page["SEED"])
    page |= {"device": device, "provenance": data.provenance, "classes": data.classes, "world": helpers.join_world()}
    page |= {"layout": torch.channels_last, "criterion": torch.nn.CrossEntropyLoss(), "precision": "fp32"}
    pixels = page["train_part"].images[:10_000].float() / 255
    page |= {"mean": pixels.mean(dim=(0, 2, 3)), "std": pixels.std(dim=(0, 2, 3))}
    page |= {"training": dict(shuffle=True, augment=page["augment"], seed=page["SEED"])}
    page |= {"summary": {}, "run": unittest.mock.Mock()}
    machine = f"{helpers.device_name(device)}, torch {torch.__version__}, torchvision {torchvision.__version__}"
    measured = f"{arguments.seeds} seeds; {machine}; {time.strftime('%Y-%m-%d')}"
    stored = json.loads(store.read_text(encoding="utf-8")) if store.exists() else {}

    def keep(name: str, setting: str, variants: dict, **more) -> None:
        """Write the store, in the order of the page, with this experiment in it."""
        entry = {"measured": f"{data.provenance}; {setting}, {measured}", **vars(data.provenance), **more}
        stored[name] = entry | {"variants": variants}
        ordered = {name: stored[name] for name in known if name in stored}
        temporary = store.with_suffix(".part")
        temporary.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, store)

    for name in names:
        if name == "recipe":
            rows = chosen("row", arguments.rows, list(page["recipe_rows"]()))
            before = stored.get("recipe", {}).get("variants", {}) if arguments.rows else {}
            train_recipe(page, data, rows, arguments.seeds, before, keep)
        else:
            train_cell(page, name, cells[name], keep)


def chosen(kind: str, text: str, known: list[str]) -> list[str]:
    """The names in `text`, separated by commas; all that are known where it is empty."""
    names = [name.strip() for name in text.split(",") if name.strip()] or known
    if unknown := sorted(set(names) - set(known)):
        raise helpers.LabError(f"No {kind} called {', '.join(unknown)}. There are: {', '.join(known)}.")
    return names


def train_cell(page: dict, name: str, source: str, keep) -> None:
    """Execute a cell of the page; what it asks `experiment` for is trained here, and kept."""

    def experiment(called, variants):
        if called != name:  # another one of the same cell
            return
        start, results, seeds = time.perf_counter(), {}, page["EXPERIMENT_SEEDS"]
        for variant, options in list(variants.items())[: 2 if helpers.flag("FAST") else None]:
            results[variant] = [page["train_variant"](seed, **options) for seed in range(1, seeds + 1)]
            print(f"{name}, {variant}: {'  '.join(f'{accuracy:.2%}' for accuracy in results[variant])}", flush=True)
        rounded = {str(variant): [round(a, 4) for a in accuracies] for variant, accuracies in results.items()}
        keep(name, f"{page['EXPERIMENT_IMAGES']:,} images", rounded, seconds=round(time.perf_counter() - start, 1))
        return results

    exec(source, page | {"experiment": experiment})


def train_recipe(page: dict, data, rows: list[str], seeds: int, variants: dict, keep) -> None:
    """Train rows of the ablation; `variants` holds those that were trained before."""
    sizes = SMOKE if helpers.flag("FAST") else RECIPE
    part, held_out = helpers.hold_out(data, min(RECIPE_HELD_OUT, len(data) // 5), 0)
    part = part.subset(torch.arange(min(sizes["train"], len(part))))
    setting = f"{len(part):,} training and {len(held_out):,} held-out images, widths {sizes['widths']}, "
    setting += f"{sizes['epochs']} epochs in batches of {sizes['batch_size']}, fp32"
    shape = sizes["widths"], page["REFINE"], sizes["epochs"], sizes["batch_size"]
    variants = {row: [] if row in rows else variants.get(row, []) for row in page["recipe_rows"]()}
    for seed in range(1, seeds + 1):
        for row in rows:  # seed by seed, so that slow hours of a shared machine hit all rows alike
            result = page["train_row"](page["recipe_rows"]()[row], part, held_out, page["device"], *shape, seed)
            variants[row].append([round(number, 4) for number in result])
            print(f"seed {seed}  {row:<26} accuracy {result[0]:.4f}  six views {result[1]:.4f}  {result[2]:.1f} s")
            there = {row: results for row, results in variants.items() if results}
            seconds = round(sum(result[2] for results in there.values() for result in results), 1)
            keep("recipe", setting, there, seconds=seconds, **sizes | {"train": len(part)})


if __name__ == "__main__":
    main()
