"""Train the experiments of a notebook's section 10 and store them where the page reads them.

    LAB_DATASET=… python tests/experiments.py cifar|mnist [--seeds N] [--names "name,name"]

The variants, the training and the settings are the page's own: its definitions are executed, and then each cell that
calls `experiment`. Accuracies are on images held out of the training set; the test set is not read. Each experiment
is stored as soon as it is there, and those that are not named keep what was stored.
"""

import argparse
import json
import sys
import unittest.mock
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import helpers
import notebooks


def main() -> None:
    """Parse the command line, train, store after each experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lab", choices=("mnist", "cifar"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--names", default="", help="names, with commas; default: all")
    parser.add_argument("--store", type=Path)
    arguments = parser.parse_args()
    store = arguments.store or helpers.HERE / "runs" / "reference" / arguments.lab / "experiments.json"

    notebook = f"{arguments.lab.upper()}.ipynb"
    page = notebooks.page(notebook, EXPERIMENTS="all", EXPERIMENT_SEEDS=arguments.seeds)
    cells = notebooks.experiment_cells(notebook)
    names = [name.strip() for name in arguments.names.split(",") if name.strip()] or list(cells)
    if unknown := set(names) - set(cells):
        raise helpers.LabError(f"No experiment called {sorted(unknown)}. The experiments: {', '.join(cells)}.")

    helpers.reuse_memory()
    data = helpers.load(page["DATASET"], train=True, shape=(1, 28, 28) if arguments.lab == "mnist" else (3, 32, 32))
    page["train_part"], page["validation_part"] = helpers.hold_out(data, page["VALIDATION"], page["SEED"])
    page["device"], page["provenance"] = helpers.pick_device(page["DEVICE"]), data.provenance
    page["writer"] = unittest.mock.Mock()  # its figures are of no use here
    page |= {"world": helpers.join_world(), "layout": torch.channels_last, "summary": {}, "classes": data.classes}
    stored = json.loads(store.read_text(encoding="utf-8")) if arguments.names and store.exists() else {}
    for name in names:
        exec(cells[name], page)
        results = page["results"]
        stored[name] = {"measured": f"{data.provenance}; {results.measured}; {helpers.now()[:10]}"}
        stored[name] |= {**data.provenance.as_metrics(), "seconds": round(results.seconds, 1)}
        stored[name]["variants"] = {str(variant): [round(a, 4) for a in values] for variant, values in results.items()}
        stored = {name: stored[name] for name in cells if name in stored}  # in the order of the page
        with helpers.replacing(store) as temporary:
            temporary.write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
