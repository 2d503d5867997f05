"""A pytest plugin: every test and every notebook cell runs in the smoke mode, offline, in folders of its own."""

import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # helpers.py

for name in [name for name in os.environ if name.startswith("LAB_")]:
    del os.environ[name]  # the user's own settings would change what is tested
scratch = tempfile.TemporaryDirectory(prefix="lab-tests-")  # removed when the tests end
os.environ |= {
    "OMP_NUM_THREADS": "1",  # a process of its own keeps each core busy; threads of several would wait for one another
    "LAB_FAST": "1",
    "LAB_OFFLINE": "1",
    "LAB_DATA": f"{scratch.name}/data",
    "LAB_RUNS": f"{scratch.name}/runs",
}
