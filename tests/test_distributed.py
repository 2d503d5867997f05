"""Several processes on this machine, over gloo: the same results, one writer, and no process left behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import nbformat
import psutil
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import helpers
import notebooks

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
RANKS = str(notebooks.ROOT / "tests" / "ranks.py")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def torchrun(*arguments, seconds=120, **variables):
    command = [*TORCHRUN, *map(str, arguments)]
    environment = ENVIRONMENT | {name: str(value) for name, value in variables.items()}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds, check=False)


def result(output):
    [line] = [line for line in output.splitlines() if line.startswith("RESULT ")]
    return json.loads(line.removeprefix("RESULT "))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def results():
    """What ranks.py printed with 1 process, with 2, and with 4 in two torchrun agents as on two machines."""
    by_size = {}
    alone = subprocess.run([sys.executable, RANKS], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert alone.returncode == 0, alone.stderr
    by_size[1] = result(alone.stdout)
    two = torchrun("--standalone", "--nproc-per-node=2", RANKS)
    assert two.returncode == 0, two.stderr
    by_size[2] = result(two.stdout)
    nodes = ["--nnodes=2", "--nproc-per-node=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    agents = [subprocess.Popen([*TORCHRUN, *nodes, "--rdzv-id=test", RANKS], **pipes) for _ in range(2)]
    outputs = [agent.communicate(timeout=180) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    by_size[4] = result("".join(out for out, _ in outputs))
    return by_size


@pytest.mark.parametrize("size", [2, 4])
def test_same_losses_as_alone_to_rounding(results, size):
    alone, several = results[1]["MNIST"], results[size]["MNIST"]
    assert several["losses"] == pytest.approx(alone["losses"], rel=2e-4)
    assert several["loss_sum"] == pytest.approx(alone["loss_sum"], rel=2e-4)
    assert abs(several["correct"] - alone["correct"]) <= 1
    assert several["test"][0] == pytest.approx(alone["test"][0], rel=1e-3)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", ["MNIST", "CIFAR10"])
def test_all_ranks_end_with_identical_weights_and_every_test_image_once(results, size, name):
    assert results[size]["size"] == size
    several = results[size][name]
    assert len(several["weights"]) == size
    assert len(set(several["weights"])) == 1
    assert several["logits"][0] == 101


def test_local_statistics_stay_near_those_of_one_process(results):
    alone, several = results[1]["CIFAR10"]["losses"], results[4]["CIFAR10"]["losses"]
    assert several[0] == pytest.approx(alone[0], rel=0.2)


def children():
    return {process.pid for process in psutil.Process().children(recursive=True)}


def notebook(path, source):
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)]), path)
    return str(path)


START = f"import sys, time; sys.path.insert(0, {str(helpers.HERE)!r}); import helpers; world = helpers.join_world()\n"


def test_launch_runs_the_notebook_once_and_leaves_nothing(tmp_path, capsys):
    before = children()
    helpers.launch("MNIST.ipynb", 2, 150, RUNS=tmp_path, EPOCHS=2, BATCH_SIZE=100, EXPERIMENTS="", EMBEDDINGS=0)
    printed = capsys.readouterr().out
    assert printed.count("epoch  2  train loss") == 1
    [run] = (tmp_path / "mnist").iterdir()
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["world_size"] == 2
    assert len(list(run.glob("events*"))) == 1
    assert (run / "report.html").exists()
    assert children() == before


def test_launch_shows_the_failing_ranks_traceback(tmp_path):
    code = START + "time.sleep(1)\nif world.rank == 1:\n    raise ZeroDivisionError('of rank one')\ntime.sleep(60)"
    start = time.monotonic()
    with pytest.raises(helpers.LabError, match="rank 1 failed") as error:
        helpers.launch(notebook(tmp_path / "a.ipynb", code), 2, 100)
    assert "ZeroDivisionError" in str(error.value)
    assert "of rank one" in str(error.value)
    assert time.monotonic() - start < 50


def test_launch_stops_what_hangs(tmp_path):
    before = children()
    path = notebook(tmp_path / "a.ipynb", START + "print('begun', flush=True); time.sleep(600)")
    with pytest.raises(helpers.LabError, match="did not end within 8 s"):
        helpers.launch(path, 2, 8)
    assert children() == before


def test_bad_input_is_one_error_of_rank_0(tmp_path):
    with pytest.raises(helpers.LabError) as error:
        helpers.launch("MNIST.ipynb", 2, 60, RUNS=tmp_path, BATCH_SIZE=25)
    assert str(error.value).count("LAB_BATCH_SIZE=25 cannot be shared by 2") == 1


# What both launched notebooks do: add up over their ranks, then find that the ranks were given different settings.
ADD_AND_DIFFER = """
import os, torch
[total] = helpers.sum_over_ranks(torch.tensor({first} + world.rank))
print("total", total.item())
os.environ["LAB_EPOCHS"], EPOCHS = str(1 + world.rank), 0
try:
    helpers.override_settings(globals())
except helpers.LabError as error:
    print(error)
"""


def test_two_launches_at_once_do_not_collide_and_differing_settings_are_named(tmp_path, capsys):
    paths = [notebook(tmp_path / f"{n}.ipynb", START + ADD_AND_DIFFER.format(first=n)) for n in (10, 20)]
    with ThreadPoolExecutor() as pool:
        jobs = [pool.submit(helpers.launch, path, 2, 100) for path in paths]
    assert [job.exception() for job in jobs] == [None, None]
    printed = sorted(capsys.readouterr().out.splitlines())
    differ = "Settings differ between processes: {'EPOCHS': 1} on rank 0, {'EPOCHS': 2} on rank 1."
    assert printed == [differ, differ, "total 21", "total 41"]


def test_when_rank_0_fails_to_get_the_data_the_others_go_on_at_once(monkeypatch):
    monkeypatch.setattr(helpers, "_store", torch.distributed.HashStore())
    monkeypatch.setattr(helpers, "_turns", 0)
    monkeypatch.setattr(helpers, "_world", helpers.World(0, 2, 0))
    with pytest.raises(helpers.DataUnavailable), helpers.rank_0_first("download"):
        raise helpers.DataUnavailable("no network")
    monkeypatch.setattr(helpers, "_turns", 0)  # now as the other process
    monkeypatch.setattr(helpers, "_world", helpers.World(1, 2, 1))
    begin = time.monotonic()
    with helpers.rank_0_first("download", seconds=30):
        assert time.monotonic() - begin < 5


def test_a_port_in_use(monkeypatch):
    monkeypatch.setattr(helpers, "_world", helpers.World())
    monkeypatch.setattr(helpers, "_route_output", lambda rank: None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        place = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": taken.getsockname()[1]}
        for name, value in place.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(helpers.LabError, match="address already in use"):
            helpers.join_world(5)


@pytest.mark.parametrize("name", notebooks.NAMES)
def test_the_page_sets_its_rate_beside_the_launched_runs(name, tmp_path, monkeypatch):
    def finish(run, size, rate):
        (tmp_path / run).mkdir()
        (tmp_path / run / "metrics.json").write_text(json.dumps({"world_size": size, "images_per_second": rate}))

    finish("an older one", 8, 9000.0)
    finish("this", 1, 1000.0)
    monkeypatch.setattr(helpers, "launch", lambda notebook, processes, **settings: finish("new", processes, 1500.0))
    tables, [cell] = {}, [cell for cell in notebooks.code_cells(name) if "helpers.launch(" in cell.source]
    page = dict(
        PROCESSES=2, SETTINGS={"EPOCHS": 1}, world=helpers.World(), run=tmp_path / "this", helpers=helpers, json=json
    )
    exec(cell.source, page | {"writer": SimpleNamespace(add_text=tables.__setitem__)})
    lines = tables["tables/processes"].splitlines()
    assert lines[2:] == ["| 1 | 1,000 | 1.00 × |", "| 2 | 1,500 | 1.50 × |"]


def test_a_rendezvous_that_never_completes_is_an_error_within_the_time():
    code = START.replace("join_world()", "join_world(3)")
    lonely = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    lonely["MASTER_PORT"] = str(free_port())
    process = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT | lonely, capture_output=True, text=True, timeout=60, check=False
    )
    assert process.returncode != 0
    assert "did not come within" in process.stderr


def test_more_ranks_than_gpus(monkeypatch):
    for name, value in {"RANK": 0, "WORLD_SIZE": 4, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(helpers, "_world", helpers.World())
    monkeypatch.setattr(helpers, "_route_output", lambda rank: None)
    with pytest.raises(helpers.LabError, match="4 processes on this machine, but 2 GPU"):
        helpers.join_world()


def test_alone_everything_is_the_identity():
    model, tensors = torch.nn.Linear(2, 2), (torch.ones(3), torch.tensor(2))
    assert helpers.join_world() == helpers.World(0, 1, 0)
    assert helpers.distribute(model) is model
    assert all(a is b for a, b in zip(helpers.sum_over_ranks(*tensors), tensors, strict=True))
    assert helpers.from_all_ranks("x") == ["x"]
    assert helpers.from_rank_0("x") == "x"


def test_killed_rank_restarts_from_the_checkpoint_and_each_epoch_is_logged_once(tmp_path):
    settings = {"LAB_RUNS": tmp_path, "LAB_EPOCHS": 8, "LAB_BATCH_SIZE": 20, "LAB_EXPERIMENTS": "", "LAB_EMBEDDINGS": 0}
    command = [*TORCHRUN, "--standalone", "--nproc-per-node=2", "--max-restarts=1", "-m", "IPython"]
    job = subprocess.Popen(
        [*command, "--colors=NoColor", str(notebooks.ROOT / "MNIST.ipynb")],
        env=ENVIRONMENT | {name: str(value) for name, value in settings.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    end = time.monotonic() + 90
    while not list(tmp_path.glob("mnist/*/checkpoint.previous.pt")) and time.monotonic() < end:
        time.sleep(0.05)  # the second epoch is over
    workers = [p for p in psutil.Process(job.pid).children(recursive=True) if "IPython" in " ".join(p.cmdline())]
    workers[-1].send_signal(signal.SIGKILL)
    output, _ = job.communicate(timeout=150)
    assert job.returncode == 0, output
    [run] = (tmp_path / "mnist").iterdir()
    assert "resuming" in output
    [events] = run.glob("events*")
    points = EventAccumulator(str(events)).Reload().Scalars("loss/train")
    assert [point.step for point in points] == list(range(1, 9))
    assert json.loads((run / "metrics.json").read_text())["epochs"] == 8
