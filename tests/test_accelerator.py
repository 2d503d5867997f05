"""The core of each page on a device that is not the CPU, compared with the CPU; accelerator.py says what the device is.

Where that is not a GPU, no time of it means anything.
"""

import importlib.util
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import accelerator
import helpers
from notebooks import NAMES

DRIVERS = [Path(f"{root}/vulkan/icd.d") for root in ("/usr/share", "/usr/local/share", "/etc")]
# Largest difference as a share of the largest value. Rounding makes 1e-7, and each training step multiplies it.
ROUNDING = 1e-4


@pytest.fixture(scope="module")
def seen(request, tmp_path_factory):
    """What accelerator.py saw of the page, and all that it printed."""
    gpu = torch.accelerator.is_available()
    if not gpu and importlib.util.find_spec("torchvulkan") is None:
        pytest.skip("no torchvulkan: python -m pip install torchvulkan")
    driver = next((file for place in DRIVERS for file in sorted(place.glob("lvp_icd*.json"))), None)
    if not gpu and driver is None:
        pytest.skip("no software driver for Vulkan: apt-get install mesa-vulkan-drivers")
    folder, cache = tmp_path_factory.mktemp("accelerator"), request.config.cache.mkdir("shaders")
    variables = dict.fromkeys(("VK_DRIVER_FILES", "VK_ICD_FILENAMES"), driver)  # the second for old loaders
    variables |= dict.fromkeys(("TORCHVULKAN_CACHE_DIR", "MESA_SHADER_CACHE_DIR"), cache) | {"LAB_RUNS": folder}
    result = subprocess.run(
        [sys.executable, accelerator.__file__, request.param],
        env=os.environ | {name: str(value) for name, value in variables.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    if result.returncode == accelerator.UNUSABLE:
        pytest.skip(f"the device cannot be used: {result.stdout.strip()}")
    assert result.returncode == 0, result.stdout
    seen = json.loads(result.stdout.splitlines()[-1])
    fell_back = ", ".join(seen["fell_back"]) or "nothing"
    print(f"{request.param} on {seen['name']}, {seen['seconds']} s; fell back to the CPU: {fell_back}")
    if seen["fell_back"]:
        warnings.warn(f"{request.param}: not computed by {seen['name']}: {fell_back}", stacklevel=1)
    return seen | {"page": request.param, "printed": result.stdout}


pytestmark = pytest.mark.parametrize("seen", NAMES, indirect=True)


def test_the_device_is_chosen_named_and_used(seen):
    assert seen["automatic"] == seen["kind"] != "cpu"
    assert seen["places"] == [f"{seen['kind']}:0"]
    assert f"device {seen['kind']}: {seen['name']}\n" in seen["printed"]
    assert json.loads(Path(seen["checkpoint"]).with_name("config.json").read_text())["device"] == seen["name"]


def test_the_batches_are_those_of_the_cpu(seen):
    assert seen["labels"]
    assert seen["images"] < 1e-4, "normalised pixels differ by more than rounding"


def test_a_whole_training_gives_what_it_gives_on_the_cpu(seen):
    assert max(seen["whole"].values()) < ROUNDING, seen["whole"]


@pytest.mark.parametrize("begun", ["begun_there", "begun_on_the_cpu"])
def test_a_run_goes_on_on_the_other_device_as_if_it_had_not_moved(seen, begun):
    assert max(seen[begun].values()) < ROUNDING, seen[begun]


def test_a_run_goes_on_on_the_same_device_with_its_next_random_numbers(seen):
    assert seen["random_numbers"]


def test_its_checkpoint_is_read_where_there_is_no_such_device(seen):
    saved = helpers.load_checkpoint(Path(seen["checkpoint"]))
    assert saved["epoch"] == 2
    assert {tensor.device.type for tensor in saved["parts"]["model"][0].values()} == {"cpu"}


def test_a_precision_that_it_does_not_have_is_refused(seen):
    if seen["kind"] == "cuda":
        pytest.skip("the GPU may have bf16")
    assert seen["precision"].startswith(f"LAB_PRECISION=bf16 on {seen['name']}: "), seen["precision"]
