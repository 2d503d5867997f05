"""What no line of the kit may do. What must be refused when it arrives from outside is tested where it arrives."""

import ast
import io
import os
import pickle
import tarfile

import pytest
import torch

import helpers
import notebooks
from tests import documents

SOURCES = {"helpers.py": (helpers.HERE / "helpers.py").read_text(encoding="utf-8")}
SOURCES |= {name: "\n".join(cell.source for cell in notebooks.code_cells(name)) for name in notebooks.NAMES}


def calls():
    """The function, the options and the file of every call."""
    for name, source in SOURCES.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call):
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                yield ast.unparse(node.func), options, f"{name}: {ast.unparse(node)}"


def test_nothing_is_evaluated_and_no_shell_started():
    assert sum(1 for _ in calls()) > 500
    for function, options, where in calls():
        assert function not in ("eval", "exec", "os.system", "os.popen", "subprocess.getoutput"), where
        assert options.get("shell", "False") == "False", where


class Evil:
    """What makes a directory as soon as somebody unpickles it."""

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.mkdir, (str(self.witness),)


@pytest.fixture
def evil(tmp_path):
    """An object whose code must not run: it is checked that it did not, and that it would have."""
    evil = Evil(tmp_path / "it-ran")
    yield evil
    assert not evil.witness.exists()
    pickle.loads(pickle.dumps(evil))
    assert evil.witness.exists()


@pytest.mark.parametrize("form", ["whole", "in the history", "of an old version of PyTorch"])
def test_a_crafted_checkpoint_is_refused_and_runs_nothing(evil, form, tmp_path):
    content = dict(epoch=1, parts={}, rng=[], history=[evil])
    new = form != "of an old version of PyTorch"
    path = tmp_path / "checkpoint.pt"
    torch.save(evil if form == "whole" else content, path, _use_new_zipfile_serialization=new)
    with pytest.raises(helpers.LabError, match=r"checkpoint\.pt is no readable checkpoint") as caught:
        helpers.load_checkpoint(path)
    assert "weights_only" not in str(caught.value), "how to run it is no advice"


def test_a_crafted_archive_from_a_mirror_is_refused_and_runs_nothing(evil, server, cifar, data, monkeypatch, capsys):
    files = [name for name, _ in (*cifar.table.train_list, *cifar.table.test_list)] + [cifar.table.meta["filename"]]
    with tarfile.open(fileobj=(packed := io.BytesIO()), mode="w:gz") as tar:
        for name in files:
            member, content = tarfile.TarInfo(f"{cifar.table.base_folder}/{name}"), pickle.dumps(evil)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    server.body = packed.getvalue()
    monkeypatch.setenv("LAB_MIRRORS", f"{server.url}/good")
    assert documents.main(["prefetch", "CIFAR10"]) == 1
    assert "checksum" in capsys.readouterr().err
    assert not (data / cifar.table.filename).exists()


@pytest.mark.parametrize("cifar", ["CIFAR10", "CIFAR100"], indirect=True)
@pytest.mark.parametrize("which", [0, -1])  # a batch; the names of the classes
def test_a_crafted_file_in_the_folder_is_refused_and_runs_nothing(evil, cifar, which, data, fault):
    (data / cifar.table.filename).write_bytes(cifar.archive)
    helpers.load(cifar.name, train=True, shape=(3, 32, 32))
    (data / cifar.table.filename).unlink()
    name = [*(name for name, _ in cifar.table.train_list), cifar.table.meta["filename"]][which]
    (data / cifar.table.base_folder / name).write_bytes(pickle.dumps(evil))
    with fault("malicious pickle in place of a batch") as seen:
        with pytest.raises(helpers.LabError, match=rf"does not match:\n.*/{name} ") as caught:
            helpers.load(cifar.name, train=True, shape=(3, 32, 32))
        seen(caught.value)


def test_servers_stay_on_this_machine_and_keep_their_tokens():
    """That TensorBoard listens to this machine only is tested with the real server, in test_tensorboard.py."""
    readme = (helpers.HERE / "README.md").read_text(encoding="utf-8")
    for text in (*SOURCES.values(), readme):
        for opening in ("0.0.0.0", "--bind_all", "--ip=", ".token", "allow_origin", "disable_check_xsrf", "allow_root"):
            assert opening not in text, opening
