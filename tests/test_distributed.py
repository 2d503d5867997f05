"""Several processes on this machine, over gloo: the same results, one writer, and no process left behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import nbformat
import numpy as np
import psutil
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import helpers
import notebooks
import ranks
import toy

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.fixture
def together(start):
    """A function that calls another one in `size` processes and returns their results, by rank."""

    def call(function, *arguments, size=2, machines=1, **options):
        places = toy.ranks(size, machines) if size > 1 else [{}]
        call.processes = [start(function, *arguments, variables=place, **options) for place in places]
        return [process.result() for process in call.processes]

    return call


class TestResults:
    """Training is the same at any number of processes, to rounding; evaluation counts every image once."""

    def test_of_both_pages(self, together):
        [alone] = together(ranks.train_pages, size=1)
        several = together(ranks.train_pages)
        for name, expected in alone.items():
            results = [result[name] for result in several]
            assert len({result["weights"] for result in results}) == 1
            assert len({tuple(result["losses"]) for result in results}) == 1
            for result in results:
                assert np.allclose(result["logits"], expected["logits"], atol=1e-4)
                assert result["untrained"] == pytest.approx(expected["untrained"], rel=1e-4)
            if name == "MNIST":  # the other network normalises each process's share of a batch by itself
                assert result["losses"] == pytest.approx(expected["losses"], rel=2e-4)
                assert result["loss_sum"] == pytest.approx(expected["loss_sum"], rel=2e-4)
                assert abs(result["correct"] - expected["correct"]) <= 1

    @pytest.mark.parametrize("size", [2, 3])
    def test_the_batches_are_the_same(self, together, size):
        [alone] = together(ranks.batches, size=1)
        several = together(ranks.batches, size=size)
        for number, one in enumerate(alone):
            for place, (images, labels) in enumerate(one):
                for rank, result in enumerate(several):
                    own_images, own_labels = result[number][place]
                    assert np.array_equal(own_images, images[rank::size])
                    assert np.array_equal(own_labels, labels[rank::size])

    def test_running_statistics_become_the_mean_of_the_processes(self, together):
        (mine, after), (theirs, after_there) = together(ranks.statistics)
        for a, b, result, result_there in zip(mine, theirs, after, after_there, strict=True):
            assert not np.array_equal(a, b)
            assert np.array_equal(result, ((a.astype(np.float64) + b) / 2).astype(np.float32))
            assert np.array_equal(result, result_there)


def without_times(history):
    """A history without what depends on the clock."""
    times = ("seconds", "samples", "images_per_second")
    return [{tag: value for tag, value in entry.items() if tag not in times} for entry in history]


class TestRun:
    def test_one_process_writes_for_all(self, together, runs):
        (path, history, weights), (their_path, their_history, their_weights) = together(ranks.train)
        assert (their_path, their_weights) == (path, weights)
        assert without_times(their_history) == without_times(history)
        assert together.processes[0].output.count("epoch  2") == 1
        assert together.processes[1].output == "", "only the first process prints"
        assert list((runs / "toy").iterdir()) == [path]
        assert len(list(path.glob("events*"))) == 1
        assert {"config.json", "history.json", "checkpoint.pt", "metrics.json", "report.html"} <= set(os.listdir(path))
        metrics = json.loads((path / "metrics.json").read_text())
        assert (metrics["world_size"], metrics["epochs"]) == (2, 3)
        assert metrics["images_per_second"] == pytest.approx(3 * 200 / metrics["train_seconds"])
        assert history[0]["samples"], "the first process's device is watched"

    def test_killed_and_resumed_equals_undisturbed(self, together, start, runs):
        path, history, weights = together(ranks.train)[0]
        (path / "checkpoint.pt").unlink()
        moments = [None, "step 2 of epoch 2"]
        killed = [
            start(ranks.train_until_one_is_killed, moment, variables=place)
            for moment, place in zip(moments, toy.ranks(2), strict=True)
        ]
        assert killed[1].end() == -signal.SIGKILL
        assert killed[0].end() == 1, "the other one should notice"
        path, again, same_weights = together(ranks.train, RESUME="latest")[0]
        assert together.processes[0].output.startswith(f"resuming {path.name}\nepoch  2")
        assert same_weights == weights
        assert without_times(again) == without_times(history)

    def test_mistakes_are_errors_of_all_processes(self, together):
        expected = [
            "LAB_RESUME=nowhere: there is no checkpoint.pt",
            "LAB_BATCH_SIZE=41: must be from 1 to",
            "LAB_DATASET='nowhere' is none of",
        ]
        for errors in together(ranks.mistakes):
            assert [error[: len(start)] for error, start in zip(errors, expected, strict=True)] == expected


class TestJoining:
    def test_alone_everything_is_the_identity(self):
        model, tensors = torch.nn.Linear(2, 2), (torch.ones(3), torch.tensor(2))
        assert helpers.join_world() == helpers.World(0, 1)
        assert helpers.distribute(model) is model
        assert all(a is b for a, b in zip(helpers.sum_over_ranks(*tensors), tensors, strict=True))

    def test_more_processes_than_gpus(self, monkeypatch):
        for name, value in toy.ranks(4)[0].items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(
            torch.cuda, "set_device", lambda device: (_ for _ in ()).throw(RuntimeError("invalid device"))
        )
        with pytest.raises(helpers.LabError, match=r"Not all 4 processes came .*invalid device"):
            helpers.join_world()

    def test_the_others_never_come(self, start):
        begin = time.monotonic()
        lonely = start(ranks.join, 3, variables=toy.ranks(2)[0])
        assert lonely.result().startswith("Not all 2 processes came within 3 s: ")
        assert time.monotonic() - begin < 30

    def test_a_port_in_use(self, start):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            place = toy.ranks(2)[0] | {"MASTER_PORT": str(taken.getsockname()[1])}
            assert "address already in use" in start(ranks.join, 3, variables=place).result()


# ------------------------------------------------------------------------------------------------------------- torchrun


def notebook(path, *sources):
    """A notebook with these cells."""
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return str(path)


JOIN = f"import sys, time; sys.path.insert(0, {str(helpers.HERE)!r}); import helpers; world = helpers.join_world()\n"


def children():
    """The processes below this one."""
    return {process.pid for process in psutil.Process().children(recursive=True)}


def torchrun(path, **variables):
    """Run a notebook in two processes; return the exit code and what was printed."""
    command = [*TORCHRUN, "-m", "IPython", "--colors=NoColor", path]
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    job = subprocess.run(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return job.returncode, job.stdout


def test_a_page_runs_in_two_processes_and_leaves_nothing(tmp_path):
    """The page's first eight sections."""
    before, sources = children(), [cell.source for cell in notebooks.code_cells("MNIST.ipynb")]
    end = next(place for place, source in enumerate(sources) if "run.finish(" in source)
    sources = [f"import sys; sys.path.insert(0, {str(helpers.HERE)!r})", *sources[: end + 1]]
    sources.append(next(cell.source for cell in notebooks.code_cells("MNIST.ipynb") if "write_report" in cell.source))
    path, variables = notebook(tmp_path / "a.ipynb", *sources), dict(LAB_EPOCHS="2", LAB_BATCH_SIZE="100")
    code, printed = torchrun(path, LAB_RUNS=str(tmp_path / "launched"), **variables)
    assert code == 0, printed
    assert printed.count("epoch  2") == printed.count("not interactive: TensorBoard is not started") == 1
    [run] = (tmp_path / "launched" / "mnist").iterdir()
    metrics = json.loads((run / "metrics.json").read_text())
    assert (metrics["world_size"], metrics["epochs"]) == (2, 2)
    assert len(list(run.glob("events*"))) == 1
    assert (run / "report.html").exists()
    assert children() == before


def test_the_failing_ranks_traceback_is_shown(tmp_path):
    code = "time.sleep(1)\nif world.rank == 1:\n    raise ZeroDivisionError('of rank one')\ntime.sleep(600)"
    begin, before = time.monotonic(), children()
    returned, printed = torchrun(notebook(tmp_path / "a.ipynb", JOIN + code))
    assert returned != 0
    assert "[rank 1]" in printed
    assert "raise ZeroDivisionError('of rank one')" in printed, "the line should be shown"
    assert time.monotonic() - begin < 120, "the others should not be waited for"
    assert children() == before


def test_a_killed_rank_is_restarted_and_the_job_goes_on_with_its_run(runs):
    command = [*TORCHRUN, "--max-restarts=1", str(notebooks.ROOT / "tests" / "toy.py")]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output, _ = job.communicate(timeout=120)
    finally:
        job.terminate()  # torchrun ends its processes then
    assert job.returncode == 0, output
    [run] = (runs / "toy").iterdir()
    assert f"resuming {run.name}" in output
    points = EventAccumulator(str(run)).Reload().Scalars("loss/train")
    assert [point.step for point in points] == [5, 10, 15, 20]
    assert json.loads((run / "metrics.json").read_text())["epochs"] == 4
