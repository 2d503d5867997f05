"""A pytest plugin: every test and every notebook cell runs in the smoke mode, offline, in folders of its own."""

import os
import sys
import tempfile
from pathlib import Path

here = Path(__file__).resolve().parent
sys.path[:0] = [str(here.parent), str(here)]  # helpers.py, and the modules beside this one

for name in [name for name in os.environ if name.startswith("LAB_")]:
    del os.environ[name]  # the user's own settings would change what is tested
scratch = tempfile.TemporaryDirectory(prefix="lab-tests-")  # removed when the tests end
os.environ |= {
    "OMP_NUM_THREADS": "1",  # a process of its own keeps each core busy; threads of several would wait for one another
    # On one core PyTorch warns of a DataLoader with two workers, rightly; but the tests see to it that stderr is empty.
    "PYTHONWARNINGS": "ignore:This DataLoader will create:UserWarning",
    "LAB_FAST": "1",
    "LAB_OFFLINE": "1",
    "LAB_DATA": f"{scratch.name}/data",
    "LAB_RUNS": f"{scratch.name}/runs",
}
