"""Run something in a process of its own, as a user without rights if need be, whoever runs the tests."""

import codecs
import multiprocessing
import os
import sys
from pathlib import Path

import pytest

NOBODY = 65534
needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="starts processes by fork")


def in_child(function, nobody=False):
    """Call the function in a forked process, which gives up root's rights first if it is to be `nobody`.

    Returns its result, or raises its error.
    """
    if nobody and os.geteuid() == 0:
        for place in (Path(sys.prefix).resolve(), Path(__file__).resolve().parent):
            if closed := [folder for folder in (place, *place.parents) if not folder.stat().st_mode & 0o001]:
                pytest.skip(f"the user nobody could not import anything: {closed[-1]} is closed to others")
    codecs.lookup("hex")  # MNIST's files are read with it, and Python itself may lie where nobody cannot import it
    context = multiprocessing.get_context("fork")
    answers = context.Queue()

    def child():
        try:
            if nobody and os.geteuid() == 0:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            answers.put((function(), None))
        except Exception as error:
            answers.put((None, error))

    process = context.Process(target=child)
    process.start()
    result, error = answers.get(timeout=60)
    process.join(10)
    if error is not None:
        raise error
    return result


def write_protect(folder):
    """Take the right to write from everybody, for all that is in the folder and for itself."""
    for path in [*Path(folder).rglob("*"), Path(folder)]:
        path.chmod(0o555 if path.is_dir() else 0o444)
