"""What people who do this job ran into: leftovers of an environment, notebooks used badly, side tools that fail."""

import os
import shutil
import subprocess
import sys
import time

import pytest
import torch

import helpers
import notebooks
import toy
from tests import documents


def python(program, folder=helpers.HERE, **variables):
    """Run a program in a process of its own in `folder`; return what it printed, and its exit code."""
    command = [sys.executable, "-c", program]
    how = dict(cwd=folder, env=os.environ | variables, capture_output=True, text=True, check=False)
    result = subprocess.run(command, **how)
    return result.stdout + result.stderr, result.returncode


@pytest.fixture(autouse=True)
def row(fault, request):
    """Makes each test a row of the table of tests/faults.py."""
    with fault(request.node.originalname.removeprefix("test_").replace("_", " ")):
        yield


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


class TestEnvironment:
    @pytest.mark.parametrize(("size", "rank"), [("4", None), ("four", None), ("2", "5"), ("2", "x")])
    def test_a_world_without_a_rank_is_named(self, size, rank, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", size)
        if rank is not None:
            monkeypatch.setenv("RANK", rank)
        with pytest.raises(helpers.LabError, match=f"WORLD_SIZE={size}, RANK={rank or 'none'}: no rank below the size"):
            helpers.join_world()
        monkeypatch.setenv("WORLD_SIZE", "")
        assert helpers.join_world() == (0, 1)

    def test_a_folder_of_a_user_who_is_not_there_is_named(self, monkeypatch):
        monkeypatch.setenv("LAB_DATA", "~nosuchuser/data")
        with pytest.raises(helpers.LabError, match="LAB_DATA=~nosuchuser/data: there is no user of this name here"):
            helpers.folder("DATA")

    def test_a_module_of_ones_own_that_hides_pythons_is_named(self, tmp_path, monkeypatch):
        (tmp_path / "statistics.py").write_text("x = 1")
        monkeypatch.setattr(helpers, "HERE", tmp_path)
        with pytest.raises(helpers.LabError, match=r"statistics\.py takes the place of Python's own statistics"):
            helpers.check_environment()

    def test_a_linked_helper_keeps_runs_beside_the_link(self, tmp_path):
        (tmp_path / "helpers.py").symlink_to(helpers.HERE / "helpers.py")
        said, code = python("import helpers; print(helpers.folder('RUNS'))", tmp_path, LAB_RUNS="")
        assert (said.strip(), code) == (str(tmp_path / "runs"), 0)

    @pytest.mark.parametrize("name", notebooks.NAMES)
    def test_a_page_without_its_kit_says_where_it_should_be(self, name, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
        with pytest.raises(ModuleNotFoundError, match=r"no helpers\.py in .*: open this page in the folder of the kit"):
            exec(notebooks.code_cells(name)[0].source, {})

    @pytest.mark.parametrize("name", notebooks.NAMES)
    def test_waiting_threads_sleep_unless_the_user_says_otherwise(self, name, monkeypatch):
        monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
        exec(notebooks.code_cells(name)[0].source, {})
        assert os.environ.pop("GOMP_SPINCOUNT") == "10000"
        monkeypatch.setenv("GOMP_SPINCOUNT", "7")
        exec(notebooks.code_cells(name)[0].source, {})
        assert os.environ["GOMP_SPINCOUNT"] == "7"

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
    def test_output_that_cannot_be_written_stops_nothing(self, tmp_path):
        program = "import helpers\nhelpers.check_environment()\nprint('x' * 100_000)\nopen('done', 'w')"
        with open("/dev/full", "w") as full:
            environment = os.environ | {"PYTHONPATH": str(helpers.HERE)}
            subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, stdout=full, check=False)
        assert (tmp_path / "done").exists()


class TestStaleNotebook:
    def test_a_loop_of_other_epochs_than_the_schedules_is_refused(self, runs):
        training = toy.Training()
        with pytest.raises(helpers.LabError, match="3 epochs became 5"):
            next(training.run.epochs(5))

    def test_an_augmentation_edited_after_the_loader_was_made_is_refused(self, runs):
        training = toy.Training()
        training.page["augment"] = lambda images, chances, epoch: images
        parts = dict(model=training.model, optimizer=training.optimizer, scheduler=training.scheduler)
        with pytest.raises(helpers.LabError, match="augment is another one since the loader was made"):
            helpers.Run("toy", training.settings, training.train_loader, **parts)

    def test_results_of_fewer_epochs_go_when_the_training_goes_on(self, runs):
        training = toy.Training()
        with pytest.raises(KeyboardInterrupt):
            training.train(toy.interrupt("step 1 of epoch 2"))
        assert training.finish()["unfinished"] == "stopped after 1 of 3 epochs"
        training.train()
        assert not (training.run.path / "metrics.json").exists()
        assert "unfinished" not in training.finish()

    def test_a_network_that_was_never_trained_is_unfinished(self, runs):
        training = toy.Training()
        assert training.finish()["unfinished"] == "stopped after 0 of 3 epochs"
        page = documents.write_report(training.run.path).read_text(encoding="utf-8")
        assert "UNFINISHED" in page.partition("</title>")[0]

    def test_a_run_whose_folder_was_deleted_is_whole_again_after_an_epoch(self, runs):
        training = toy.Training()
        training.train(lambda moment: shutil.rmtree(training.run.path) if moment == "step 2 of epoch 2" else None)
        training.finish()
        for name in ("config.json", "history.json", "metrics.json", "checkpoint.pt"):
            assert (training.run.path / name).is_file(), name
        documents.write_report(training.run.path)

    def test_renamed_classes_are_other_data(self, runs):
        from dataclasses import replace

        training = toy.Training()
        with pytest.raises(KeyboardInterrupt):
            training.train(toy.interrupt("step 1 of epoch 2"))
        training.run.close()
        other = replace(toy.digits(), classes=tuple("abcdefghij"))
        with pytest.raises(helpers.LabError, match="classes was"):
            toy.Training(data=other, RESUME=str(training.run.path))


class TestSideTools:
    def test_an_nvidia_smi_that_hangs_costs_no_time_of_the_training(self, tmp_path, monkeypatch):
        program = tmp_path / "nvidia-smi"
        program.write_text("#!/bin/sh\nsleep 20\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        monitor = helpers.Monitor(torch.device("cpu"), interval=0.02)
        monkeypatch.setattr("threading.Thread.join", lambda thread, timeout: None)  # it waits 5 s at most
        for _ in range(2):
            with monitor:
                time.sleep(0.2)
        assert monitor.seconds < 2
        assert monitor.nvidia_smi == "nvidia-smi: n/a (no answer)"

    def test_a_tensorboard_that_does_not_import_costs_a_line(self, runs, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        training = toy.Training().train()
        assert "The training goes on without TensorBoard, which cannot be used" in capsys.readouterr().out
        assert training.finish()["epochs"] == 3

    def test_one_damaged_run_hides_no_other(self, runs, monkeypatch, tmp_path):
        monkeypatch.setattr(helpers, "HERE", tmp_path)
        training = toy.Training(lab="mnist").train()
        training.finish()
        training.run.close()
        damaged = runs / "mnist" / "zzz"
        damaged.mkdir()
        (damaged / "metrics.json").write_text("{")
        assert training.run.path.name in documents.list_runs(runs)
        path, _ = documents.hand_in(output=tmp_path / "x.zip")
        assert path.is_file()

    def test_a_run_without_what_nvidia_smi_printed_has_a_report(self, runs):
        training = toy.Training(NOTE="3").train()
        training.finish()
        (training.run.path / "nvidia-smi.txt").unlink()
        documents.write_report(training.run.path)
        assert "3" in documents.list_runs(runs)
