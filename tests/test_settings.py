import pytest

import helpers


@pytest.mark.parametrize(
    ("text", "default", "expected"),
    [("3", 1, 3), ("1e-3", 0.1, 0.001), ("off", True, False), ("1", False, True), ("a b", "x", "a b")],
)
def test_parse_by_the_type_of_the_default(text, default, expected):
    value = helpers.parse_setting("NAME", text, default)
    assert value == expected
    assert type(value) is type(default)


def test_parse_tuples():
    assert helpers.parse_setting("WIDTHS", "(8, 16,32)", (64, 128)) == (8, 16, 32)
    assert helpers.parse_setting("RATES", "0.1", (1.0,)) == (0.1,)


@pytest.mark.parametrize(
    ("text", "default"), [("ten", 5), ("1.5", 5), ("", 5), ("maybe", True), ("x", 0.1), ("1,b", (1,))]
)
def test_unparsable_value_is_refused_by_name(text, default):
    with pytest.raises(helpers.LabError, match="LAB_EPOCHS"):
        helpers.parse_setting("EPOCHS", text, default)


def test_environment_overrides_settings(monkeypatch):
    monkeypatch.setenv("LAB_EPOCHS", "7")
    namespace = {"EPOCHS": 5, "SEED": 1, "lower": 2, "HELPER": object()}
    assert helpers.override_settings(namespace) == {"EPOCHS": 7, "SEED": 1}
    assert namespace["EPOCHS"] == 7


def test_unknown_variable_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("LAB_EPOCS", "7")
    with pytest.raises(helpers.LabError, match=r"LAB_EPOCS.*EPOCHS"):
        helpers.override_settings({"EPOCHS": 5})


def test_budget(monkeypatch):
    assert helpers.budget(smoke=1, cpu=2, full=3) == 1
    monkeypatch.setenv("LAB_FAST", "0")
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert helpers.budget(smoke=1, cpu=2, full=3) == 2
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    assert helpers.budget(smoke=1, cpu=2, full=3) == 3
    monkeypatch.setenv("LAB_DEVICE", "cpu")
    assert helpers.budget(smoke=1, cpu=2, full=3) == 2


def test_relative_folders_start_at_the_module(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAB_DATA", "somewhere")
    assert helpers.folder("DATA", "data") == helpers.HERE / "somewhere"
    monkeypatch.delenv("LAB_DATA")
    assert helpers.folder("DATA", "data") == helpers.HERE / "data"


def test_replacing_leaves_nothing_behind_on_failure(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")

    def write_half():
        with helpers.replacing(target) as temporary:
            temporary.write_text("ha")
            raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write_half()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_import_reads_nothing_and_prints_nothing():
    import subprocess
    import sys

    code = "import sys, helpers; print([m for m in ('torchvision', 'matplotlib', 'requests') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=helpers.HERE, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
    assert result.stderr == ""
