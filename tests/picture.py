"""Draw the figure of README from the stored runs: `python tests/picture.py [REFERENCE]` writes curves.png beside them.

REFERENCE is a folder with the runs `mnist` and `cifar`; `runs/reference` by default.
"""

import io
import json
import sys
from pathlib import Path

import PIL.Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import helpers

TITLES = {"mnist": "MNIST.ipynb: LeNet-5", "cifar": "CIFAR.ipynb: a fast CNN"}


def main(reference: Path) -> Path:
    """Draw training and validation accuracy of both runs over the seconds of training."""
    drawn, axes = helpers.figure(1, 2, size=(9, 2.9))
    for axis, (lab, title) in zip(axes, TITLES.items(), strict=True):
        files = (reference / lab / name for name in ("history.json", "metrics.json"))
        history, metrics = (json.loads(path.read_text(encoding="utf-8")) for path in files)
        for part, color, marker in (("train", 0, "o"), ("validation", 1, "s")):
            accuracies = [100 * entry[f"accuracy/{part}"] for entry in history]
            times = [entry["seconds"] for entry in history]
            axis.plot(times, accuracies, color=helpers.COLORS[color], marker=marker, markersize=4, label=part)
        jpeg = ", JPEG copies" if "jpeg" in metrics["dataset"] else ""
        axis.set_title(f"{title}\n{100 * metrics['test_accuracy']:.1f} % of the test images right{jpeg}", fontsize=11)
        axis.set(xlabel=f"seconds of training ({metrics['device'].split(', ')[-1]})", xlim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy (%)")
    axes[0].legend(frameon=False, loc="lower right")
    drawn.savefig(buffer := io.BytesIO(), format="png", facecolor="white", dpi=100)
    picture = PIL.Image.open(buffer).convert("RGB").quantize(64, dither=PIL.Image.Dither.NONE)
    picture.save(reference / "curves.png", optimize=True)
    return reference / "curves.png"


if __name__ == "__main__":
    path = main(Path(sys.argv[1]) if len(sys.argv) > 1 else helpers.HERE / "runs" / "reference")
    print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")
