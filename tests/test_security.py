"""What no line of the kit may do. What must be refused when it arrives from outside is tested where it arrives."""

import ast

import helpers
import notebooks

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
    assert sum(1 for _ in calls()) > 1000
    for function, options, where in calls():
        assert function not in ("eval", "exec", "os.system", "os.popen", "subprocess.getoutput"), where
        assert options.get("shell", "False") == "False", where


def test_files_are_read_without_trust():
    unpickled = [where for function, _, where in calls() if function in ("pickle.load", "pickle.loads")]
    assert len(unpickled) == 1, "CIFAR's batches, after their checksums matched"
    for function, options, where in calls():
        assert options.get("allow_pickle", "False") == "False", where
        assert function != "torch.load" or options["weights_only"] == "True", where
        if function.split(".")[-1] in ("extract", "extractall"):
            assert options.get("filter") == "'data'", where


def test_servers_stay_on_this_machine_and_keep_their_tokens():
    """That TensorBoard listens to this machine only is tested with the real server, in test_tensorboard.py."""
    readme = (helpers.HERE / "README.md").read_text(encoding="utf-8")
    for text in (*SOURCES.values(), readme):
        for opening in ("0.0.0.0", "--bind_all", "--ip=", ".token", "allow_origin", "disable_check_xsrf", "allow_root"):
            assert opening not in text, opening
