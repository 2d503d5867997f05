"""The networks compiled by torch.compile: their gradients are those of the networks as they are.

Compiled `amax` gave NaN in gradients more than once, which is why the network takes `max` over a flattened map. Each
size takes a quarter of a minute to compile, so they are tried with FAULTS_LONG=1 only.
"""

import os
import shutil
import subprocess
import sys

import pytest

import notebooks

CODE = """
import sys
import torch
from torch import nn
import notebooks

name, channels, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
page = notebooks.definitions(name)
torch.manual_seed(0)
model = (page.get("LeNet5") or (lambda: page["FastCNN"]((8, 16, 16))))().to(memory_format=torch.channels_last)
images = torch.randn(16, channels, size, size).contiguous(memory_format=torch.channels_last)
gradients = []
for compiled in (False, True):
    if compiled:
        model.compile(dynamic=False)
    model.zero_grad()
    nn.functional.cross_entropy(model(images), torch.arange(16) % 10).backward()
    gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
print(((gradients[0] - gradients[1]).norm() / gradients[0].norm()).item())
"""
SIZES = [*[("CIFAR.ipynb", 3, size) for size in (20, 24, 28, 32)], ("MNIST.ipynb", 1, 28)]


@pytest.mark.skipif(not os.environ.get("FAULTS_LONG"), reason="a quarter of a minute each; FAULTS_LONG=1 runs them")
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
@pytest.mark.parametrize("what", SIZES)
def test_gradients_of_the_compiled_network(what, tmp_path):
    variables = dict(TORCHINDUCTOR_COMPILE_THREADS="1", TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    variables |= dict(PYTHONPATH=os.pathsep.join([str(notebooks.ROOT), str(notebooks.ROOT / "tests")]))
    command = [sys.executable, "-c", CODE, *map(str, what)]
    result = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout.splitlines()[-1]) < 1e-4  # NaN is not
