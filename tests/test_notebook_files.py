"""What a reader on GitHub and a machine may expect of the two files, without running them."""

import ast
import itertools
import re
import subprocess
import sys

import pytest

import notebooks

SECTIONS = [
    "1 Environment 环境配置",
    "2 Data 数据准备",
    "3 Structure 网络结构",
    "4 Forward 正向传播",
    "5 Backward 反向传播",
    "6 Optimizer 优化器",
    "7 Training 训练过程",
    "8 Test 测试",
    "9 Where the time goes 性能分析",
    "10 Experiments 对比实验",
    "11 Inside the network 网络内部",
    "12 Under the loop 循环之下",
    "13 Try it yourself 动手试试",
    "14 Further steps 延伸阅读",
    "15 Report 实验报告",
]


@pytest.mark.parametrize("name", notebooks.NAMES)
class TestFile:
    def test_format_and_kernel(self, name):
        notebook = notebooks.read(name)
        assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
        assert notebook.metadata.kernelspec.name == "python3"
        assert set(notebook.metadata) <= {"kernelspec", "language_info"}
        ids = [cell.id for cell in notebook.cells]
        assert len(ids) == len(set(ids))

    def test_one_clean_run_from_top_to_bottom(self, name):
        cells = notebooks.code_cells(name)
        assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
        for cell in cells:
            for output in cell.outputs:
                assert output.output_type != "error"
                assert output.get("name") != "stderr", cell.source
                assert "\r" not in str(output)
                assert "widget-view" not in str(output.get("data", {}).keys())

    def test_figures_and_size(self, name):
        figures = [o for c in notebooks.code_cells(name) for o in c.outputs if "image/png" in o.get("data", {})]
        assert len(figures) >= 4
        assert (notebooks.ROOT / name).stat().st_size < 1_500_000

    def test_committed_run_is_of_real_data(self, name):
        text = str([cell.outputs for cell in notebooks.code_cells(name)])
        assert "STAND-IN" not in text

    def test_sections_are_the_same_in_both(self, name):
        text = "\n".join(cell.source for cell in notebooks.read(name).cells if cell.cell_type == "markdown")
        assert re.findall(r"^## (.+)$", text, flags=re.MULTILINE) == SECTIONS

    def test_links_to_sections_exist(self, name):
        text = "\n".join(cell.source for cell in notebooks.read(name).cells if cell.cell_type == "markdown")
        headings = {h.replace(" ", "-") for h in re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)}
        assert set(re.findall(r"\]\(#(.+?)\)", text)) <= headings

    def test_cells_are_plain_python_and_short(self, name):
        for cell in notebooks.code_cells(name):
            ast.parse(cell.source)  # fails on magics and shell lines
            assert len(cell.source.splitlines()) <= 40, cell.source[:80]

    def test_prose_before_every_code_cell(self, name):
        cells = notebooks.read(name).cells
        for before, cell in itertools.pairwise(cells):
            if cell.cell_type == "code":
                assert before.cell_type == "markdown", cell.source[:80]

    def test_nbval_markers_stand_alone(self, name):
        marker = r"\s*# NBVAL_(CHECK_OUTPUT|IGNORE_OUTPUT|SKIP|RAISES_EXCEPTION)\s*"
        for cell in notebooks.code_cells(name):
            for line in cell.source.splitlines():
                assert "NBVAL_" not in line or re.fullmatch(marker, line), line

    def test_no_ready_made_model(self, name):
        source = "\n".join(cell.source for cell in notebooks.code_cells(name))
        for forbidden in ("torchvision.models", "torch.hub", "timm", "pretrained"):
            assert forbidden not in source


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_ruff_has_nothing_to_say(command):
    result = subprocess.run(
        [sys.executable, "-m", "ruff", *command, str(notebooks.ROOT)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
