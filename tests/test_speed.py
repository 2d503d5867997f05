"""What makes the training fast, and what measures it."""

import functools
import itertools
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import helpers
import notebooks

CPU = torch.device("cpu")
cifar = functools.cache(lambda: notebooks.page("CIFAR.ipynb", BATCH_SIZE=100))


def split_of(shape, count=12):
    images = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return helpers.Split(images, torch.arange(count), ("a",), helpers.Provenance("test", "stand-in", False))


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_classic_dataset_gives_what_the_resident_loader_gives(shape):
    split, mean, std = split_of(shape), torch.full(shape[:1], 0.4), torch.full(shape[:1], 0.3)
    loader = torch.utils.data.DataLoader(helpers.ClassicDataset(split, mean, std), batch_size=12, num_workers=2)
    [(images, labels)] = list(loader)
    [(expected, _)] = list(helpers.ResidentLoader(split, 12, CPU, mean, std))
    assert torch.allclose(images, expected, atol=1e-5)
    assert torch.equal(labels, split.labels)


def test_classic_dataset_augments():
    data = helpers.ClassicDataset(split_of((3, 8, 8)), torch.zeros(3), torch.ones(3), flip=True, translate=2)
    torch.manual_seed(0)
    variants = torch.stack([data[0][0] for _ in range(40)])
    assert variants.shape == (40, 3, 8, 8)
    assert len(variants.unique(dim=0)) > 10


def test_rate_counts_images_after_the_first_batch():
    seen = []
    loader = [(torch.zeros(5, 1), torch.zeros(5)), (torch.zeros(3, 1), torch.zeros(3))]
    rate = helpers.images_per_second(loader, CPU, 0.05, lambda images, labels: seen.append(len(labels)))
    assert seen[:4] == [5, 3, 5, 3]
    assert (sum(seen) - 5) / 0.1 < rate <= (sum(seen) - 5) / 0.05


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 10))


def test_compiled_model_shares_its_weights_and_keeps_their_values(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    model, images = small_model(), torch.randn(6, 1, 8, 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fast = helpers.try_compile(model, [images])
    assert fast is not model
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    fast(images).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert torch.allclose(fast.eval()(images), model.eval()(images), atol=1e-5)


def test_without_a_compiler_the_model_itself_is_used_and_one_line_says_so(tmp_path):
    code = "import torch, helpers\nmodel = torch.nn.Linear(3, 3)\n"
    code += "print(helpers.try_compile(model, [torch.ones(2, 3)]) is model)"
    environment = os.environ | {"CXX": str(tmp_path / "no-such-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    environment |= {"TORCHINDUCTOR_FX_GRAPH_CACHE": "0", "PYTHONPATH": str(helpers.HERE)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    notice, same = result.stdout.strip().splitlines()
    assert notice.startswith("torch.compile fails here (")
    assert notice.endswith("going on without it.")
    assert same == "True"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the C library's allocator")
def test_reused_memory_is_not_faulted_in_again():
    code = """if True:
        import resource, sys, torch, helpers
        helpers.reuse_memory() if sys.argv[1] == "reuse" else None
        for _ in range(8): torch.zeros(2**24)  # the heap settles
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(16): torch.zeros(2**24)  # 64 MiB each
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """
    environment = os.environ | {"PYTHONPATH": str(helpers.HERE), "OMP_NUM_THREADS": "1"}
    faults = {}
    for how in ("plain", "reuse"):
        command = [sys.executable, "-c", code, how]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        faults[how] = int(result.stdout)
    if helpers.reuse_memory():
        assert faults["reuse"] < faults["plain"] / 4


def test_profile_shows_phases_and_operators(monkeypatch):
    shown = []
    monkeypatch.setattr(helpers, "show", lambda canvas, provenance: shown.append(canvas))
    with helpers.profiler(CPU) as profile:
        for _ in range(2):
            with torch.profiler.record_function("forward"):
                torch.ones(300, 300) @ torch.ones(300, 300)
            with torch.profiler.record_function("optimizer"):
                torch.ones(10).add_(1)
    helpers.show_profile(profile, ["forward", "optimizer"], 2, helpers.Provenance("test", "official", True))
    phases, operators = shown[0].axes
    assert [label.get_text() for label in phases.get_yticklabels()] == ["forward", "optimizer"]
    assert phases.patches[0].get_width() > phases.patches[1].get_width() > 0
    names = [label.get_text() for label in operators.get_yticklabels()]
    assert "mm" in names
    assert not {"forward", "optimizer"} & set(names)


def test_profile_of_a_gpu_counts_each_phase_and_kernel_once(monkeypatch):
    """As torch's profiler lists them: a phase once more among the device's events, a kernel beside its operator."""
    shown, (cpu, cuda) = [], (torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA)
    fields = ("key", "device_type", "cpu_time_total", "self_cpu_time_total", "self_device_time_total")
    rows = [("forward", cpu, 3000, 100, 0), ("aten::mm", cpu, 2000, 2000, 1500), ("aten::add", cpu, 500, 500, 200)]
    rows += [("forward", cuda, 0, 0, 1700), ("gemm_kernel", cuda, 0, 0, 1500)]
    events = [SimpleNamespace(**dict(zip(fields, row, strict=True))) for row in rows]
    monkeypatch.setattr(helpers, "show", lambda canvas, provenance: shown.append(canvas))
    profile = SimpleNamespace(key_averages=lambda: events)
    helpers.show_profile(profile, ["forward"], 1, helpers.Provenance("test", "official", True))
    phases, operators = shown[0].axes
    assert [patch.get_width() for patch in phases.patches] == [3.0]
    names = [label.get_text() for label in operators.get_yticklabels()]
    assert dict(zip(names, [patch.get_width() for patch in operators.patches], strict=True))["mm"] == 1.5
    assert "gemm_kernel" not in names


def test_averaged_views_are_the_mean_of_shifted_and_mirrored_images():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 5))
    images = torch.randn(4, 3, 8, 8)
    averaged = cifar()["AveragedViews"](model)(images)
    padded = nn.functional.pad(images, (1, 1, 1, 1), mode="reflect")
    crops = [images, images, padded[:, :, 0:8, 0:8], padded[:, :, 2:10, 2:10]]
    expected = sum(model(crop) + model(crop.flip(-1)) for crop in crops) / 8
    assert torch.allclose(averaged, expected, atol=1e-5)


def test_each_row_of_the_ablation_changes_something_and_the_last_is_the_recipe():
    page = cifar()
    rows = page["recipe_rows"]()
    for before, after in itertools.pairwise(rows.values()):
        assert before.keys() == after.keys()
        assert before != after
    last = list(rows.values())[-1]
    assert last["translate"] == page["TRANSLATE"]
    assert last["smoothing"] == page["LABEL_SMOOTHING"]
    assert last["sizes"] == page["RESOLUTIONS"]
    assert all(last[name] for name in ("flip", "alternate", "whitened", "identity", "shortcut", "muon"))


@pytest.mark.parametrize("name", ["plain", "growing images"])
def test_a_row_of_the_ablation_trains(name):
    page = cifar()
    data = helpers.stand_in("CIFAR10", True, (3, 32, 32), 400)
    part, held_out = helpers.hold_out(data, 100, 0)
    arguments = (page["recipe_rows"]()[name], part, held_out, CPU, (8, 8, 8), (1, 1, 1), 2, 50, 1)
    results = [page["train_row"](*arguments) for _ in range(2)]
    assert results[0][:2] == results[1][:2], "same seed, same accuracy"
    assert all(0 <= accuracy <= 1 for accuracy in results[0][:2])
    assert results[0][2] > 0


def test_the_stored_ablation_has_the_rows_of_the_page():
    stored = json.loads((helpers.HERE / "runs/reference/cifar/ablation.json").read_text(encoding="utf-8"))
    assert list(stored["rows"]) == list(cifar()["recipe_rows"]())
    assert {len(results) for results in stored["rows"].values()} == {3}
    assert stored["source"] in ("official", "image-folder")
