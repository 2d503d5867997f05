"""Train the rows of CIFAR.ipynb's ablation and store them where the page reads them.

    LAB_DATASET=… python tests/ablate.py [--seeds N] [--epochs N] [--widths 32,64,128] [--rows "plain,shortcut"]

Rows and training are the page's own functions. Accuracies are on images held out of the training set; the test set is
not read. Each result is stored as soon as it is there, and rows that are not named keep what was stored.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import torchvision

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import helpers
import notebooks

STORE = helpers.HERE / "runs" / "reference" / "cifar" / "ablation.json"


def main() -> None:
    """Parse the command line, train, store after each result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--widths", default="32,64,128")
    parser.add_argument("--train", type=int, default=10_000, help="training images")
    parser.add_argument("--held-out", type=int, default=5_000, help="images for the accuracy")
    parser.add_argument("--rows", default="", help="names, with commas; default: all")
    parser.add_argument("--store", type=Path, default=STORE)
    arguments = parser.parse_args()

    page = notebooks.page("CIFAR.ipynb")
    helpers.reuse_memory()
    device = helpers.pick_device(page["DEVICE"])
    widths = tuple(int(width) for width in arguments.widths.split(","))
    rows = page["recipe_rows"]()
    names = [name.strip() for name in arguments.rows.split(",") if name.strip()] or list(rows)
    if unknown := set(names) - set(rows):
        raise helpers.LabError(f"No row called {sorted(unknown)}. The rows: {', '.join(rows)}.")

    data = helpers.load(page["DATASET"], train=True, shape=(3, 32, 32))
    part, held_out = helpers.hold_out(data, min(arguments.held_out, len(data) // 5), 0)
    part = part.subset(torch.arange(min(arguments.train, len(part))))
    measured = f"{len(part):,} training and {len(held_out):,} held-out images of {data.provenance}; "
    measured += f"widths {widths}, {arguments.epochs} epochs in batches of {arguments.batch_size}, fp32, "
    measured += f"{arguments.seeds} seeds; "
    measured += f"{helpers.device_name(device)}; torch {torch.__version__}, torchvision {torchvision.__version__}; "
    measured += helpers.now()[:10]
    setting = {"widths": list(widths), "epochs": arguments.epochs, "batch_size": arguments.batch_size}
    setting["train"] = len(part)
    stored = {"rows": {}}
    if arguments.rows and arguments.store.exists():
        stored = json.loads(arguments.store.read_text(encoding="utf-8"))
        if any(stored[name] != value for name, value in setting.items()):
            raise helpers.LabError(f"{arguments.store} holds another setting: run all rows, or name another --store.")
    stored |= {"measured": measured, **setting, **data.provenance.as_metrics()}
    for name in names:
        stored["rows"][name] = []
    for seed in range(1, arguments.seeds + 1):
        for name in names:  # seed by seed, so that slow hours of a shared machine hit all rows alike
            settings = (widths, page["DEPTHS"], arguments.epochs, arguments.batch_size, seed)
            result = page["train_row"](rows[name], part, held_out, device, *settings)
            stored["rows"][name].append(result)
            print(
                f"seed {seed}  {name:<26} accuracy {result[0]:.4f}  six views {result[1]:.4f}  {result[2]:.1f} s",
                flush=True,
            )
            with helpers.replacing(arguments.store) as temporary:
                temporary.write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
