"""What a reader on GitHub and a machine may expect of notebooks, helper and documents, without running them."""

import ast
import itertools
import re
import subprocess
import sys

import pytest

import notebooks

ROOT = notebooks.ROOT

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
    "11 Report 实验报告",
    "Going further 选读",
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

    def test_sections_are_those_of_the_contract(self, name):
        text = "\n".join(cell.source for cell in notebooks.read(name).cells if cell.cell_type == "markdown")
        assert re.findall(r"^## (.+)$", text, flags=re.MULTILINE) == SECTIONS

    def test_links_to_sections_exist(self, name):
        text = "\n".join(cell.source for cell in notebooks.read(name).cells if cell.cell_type == "markdown")
        anchors = {h.replace(" ", "-") for h in re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)}
        anchors |= set(re.findall(r'<a id="(.+?)"></a>', text))
        assert set(re.findall(r"\]\(#(.+?)\)", text)) <= anchors

    def test_cells_are_plain_python_short_and_narrow(self, name):
        for cell in notebooks.code_cells(name):
            ast.parse(cell.source)  # fails on magics and shell lines
            folded = cell.metadata.get("jupyter", {}).get("source_hidden")
            assert len(cell.source.splitlines()) <= (60 if folded else 40), cell.source[:80]
            assert max(map(len, cell.source.splitlines())) <= 90, cell.source  # wider ones scroll sideways

    def test_no_cell_reads_a_name_that_has_two_meanings(self, name):
        """Else a cell that is run again, after one further below, takes what that one left."""
        cells = {cell.id: notebooks.top_level(cell.source) for cell in notebooks.code_cells(name)}
        makers = {
            made: [id for id, (names, _) in cells.items() if made in names] for id in cells for made in cells[id][0]
        }
        known = {"SETTINGS", "untrained"}  # the second cell adds to the first one's
        odd = {
            (id, read) for id, (_, reads) in cells.items() for read in reads - known if len(makers.get(read, "")) > 1
        }
        assert odd == set()

    def test_no_cell_adds_to_what_another_one_made(self, name):
        """Else the other cell, run again, loses what this one added: `built["2 Data"] = …` was lost so."""
        for cell in notebooks.code_cells(name):
            made, _ = notebooks.top_level(cell.source)
            for node in ast.parse(cell.source).body:
                places = [t.value for t in getattr(node, "targets", []) if isinstance(t, ast.Subscript)]
                added = {place.id for place in places if isinstance(place, ast.Name)} - {*made}
                assert not added, cell.id

    def test_few_settings_come_first(self, name):
        first, *others = [cell for cell in notebooks.code_cells(name) if "helpers.settings(globals()" in cell.source]
        names = [t.id for node in ast.parse(first.source).body for t in getattr(node, "targets", [])]
        assert len(set(names) - {"SETTINGS"}) <= 8
        assert "last=True" in others[-1].source

    def test_the_epoch_loop_is_short(self, name):
        [loop] = [cell.source for cell in notebooks.code_cells(name) if "in run.epochs(" in cell.source]
        assert len(loop.splitlines()) <= 16

    def test_prose_before_every_code_cell(self, name):
        cells = notebooks.read(name).cells
        for before, cell in itertools.pairwise(cells):
            if cell.cell_type == "code":
                assert before.cell_type == "markdown", cell.source[:80]

    def test_the_core_is_an_afternoon(self, name):
        cells = notebooks.read(name).cells
        begin = next(place for place, cell in enumerate(cells) if "## Going further" in cell.source)
        for part, most, words in ((cells[:begin], 70, 5_000), (cells[begin:], 40, 3_000)):
            assert len(part) <= most
            assert sum(len(cell.source.split()) for cell in part if cell.cell_type == "markdown") <= words
        assert cells[begin].metadata["jp-MarkdownHeadingCollapsed"]

    def test_nbval_markers_stand_alone(self, name):
        marker = r"\s*# NBVAL_(CHECK_OUTPUT|IGNORE_OUTPUT|SKIP|RAISES_EXCEPTION)\s*"
        for cell in notebooks.code_cells(name):
            for line in cell.source.splitlines():
                assert "NBVAL_" not in line or re.fullmatch(marker, line), line

    def test_no_ready_made_model(self, name):
        source = "\n".join(cell.source for cell in notebooks.code_cells(name))
        for forbidden in ("torchvision.models", "torch.hub", "timm", "pretrained"):
            assert forbidden not in source


class TestHelper:
    TREE = ast.parse((ROOT / "helpers.py").read_text(encoding="utf-8"))
    PUBLIC = {  # noqa: RUF012
        node.name: node
        for node in TREE.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    }

    def test_length(self):
        # The contract: what is added must be paid for elsewhere.
        assert len((ROOT / "helpers.py").read_text(encoding="utf-8").splitlines()) <= 1_300

    def test_every_public_name_has_a_docstring_and_is_used(self):
        """On a page, by checks, by the command line or by Run, in an annotation of such a one, or as an exception."""
        assert [name for name, node in self.PUBLIC.items() if not ast.get_docstring(node)] == []
        sources = [cell.source for name in notebooks.NAMES for cell in notebooks.code_cells(name)]
        sources += [(ROOT / "tests" / name).read_text(encoding="utf-8") for name in ("checks.py", "documents.py")]
        attributes = [node for text in sources for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)]
        used = {node.attr for node in attributes if ast.unparse(node.value) == "helpers"}
        used |= names_in([self.PUBLIC["Run"]])
        nodes = [node for name in used & self.PUBLIC.keys() for node in ast.walk(self.PUBLIC[name])]
        used |= names_in([node.annotation for node in nodes if isinstance(node, ast.arg | ast.AnnAssign)])
        used |= names_in([node.returns for node in nodes if isinstance(node, ast.FunctionDef)])
        used |= names_in([node.type for node in ast.walk(self.TREE) if isinstance(node, ast.ExceptHandler)])
        assert sorted(self.PUBLIC.keys() - used) == []


def names_in(nodes) -> set[str]:
    """The names that occur in the syntax trees, of which some may be None."""
    return {n.id for node in nodes if node is not None for n in ast.walk(node) if isinstance(n, ast.Name)}


class TestDocuments:
    NAMES = ("README.md", "runs/README.md", "tests/README.md")

    def test_readme_is_short_and_starts_with_the_start(self):
        lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 130
        assert "## Start" in lines[:12]

    @pytest.mark.parametrize("name", NAMES)
    def test_links_and_files_exist(self, name):
        text = (ROOT / name).read_text(encoding="utf-8")
        headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
        anchors = {"#" + re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
        for link in re.findall(r"\]\((?!https?:)(.+?)\)", text):
            assert link in anchors if link.startswith("#") else ((ROOT / name).parent / link).exists(), link

    @pytest.mark.parametrize("name", [*NAMES, *notebooks.NAMES])
    def test_scripts_exist(self, name):
        text = (ROOT / name).read_text(encoding="utf-8")
        scripts = {(ROOT / script) for script in re.findall(r"\btests/\w+\.py\b", text)}
        if name == "tests/README.md":
            scripts |= {ROOT / "tests" / script for script in re.findall(r"`(\w+\.py)\b", text)} - {
                ROOT / "tests" / "helpers.py"
            }
        assert [str(script) for script in scripts if not script.exists()] == []


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_ruff_has_nothing_to_say(command):
    result = subprocess.run(
        [sys.executable, "-m", "ruff", *command, str(ROOT)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
