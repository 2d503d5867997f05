"""What a person sees, in headless Chromium: JupyterLab runs both notebooks, TensorBoard and the report are opened.

Skipped where Selenium or Chromium is missing; `.ci/run` installs both where it may.
"""

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest
from tensorboard import program

import helpers
import notebooks
from tests import documents

webdriver = pytest.importorskip("selenium.webdriver", reason="Selenium is not installed")
CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
if not (CHROMIUM and DRIVER):
    pytest.skip("Chromium and its driver are not installed", allow_module_level=True)

ONLY_HERE = "MAP * ~NOTFOUND , EXCLUDE 127.0.0.1 , EXCLUDE localhost"  # a page that asks anybody else gets no answer
REFERENCE = helpers.HERE / "runs" / "reference"
OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1300,2000")
CELLS = """return JSON.stringify(jupyterapp.shell.currentWidget.content.widgets.filter(
    cell => cell.model.type == 'code').map(cell => [cell.model.executionCount, cell.model.outputs.toJSON()]))"""


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in (*OPTIONS, f"--host-resolver-rules={ONLY_HERE}", "--no-first-run", "--disable-component-update"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A JupyterLab on copies of the notebooks; yields its address, with %s for a notebook's name."""
    folder = tmp_path_factory.mktemp("lab")
    for name in (*notebooks.NAMES, "helpers.py"):
        shutil.copy(notebooks.ROOT / name, folder)
    (folder / "tests").mkdir()
    for name in ("__init__.py", "checks.py", "documents.py"):
        shutil.copy(notebooks.ROOT / "tests" / name, folder / "tests")
    shutil.copytree(notebooks.ROOT / "runs" / "reference", folder / "runs" / "reference")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--allow-root"]
    command += ["--IdentityProvider.token=t", "--LabApp.expose_app_in_browser=True", f"--ServerApp.root_dir={folder}"]
    environment = os.environ | {"LAB_RUNS": str(folder / "runs"), "JUPYTER_CONFIG_DIR": str(folder / "config")}
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    server = subprocess.Popen(command, env=environment, cwd=folder, **quiet)
    wait(lambda: connects(port), 60)
    yield f"http://127.0.0.1:{port}/lab/tree/%s?token=t&reset"
    server.terminate()
    server.wait(20)


def connects(port):
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def wait(condition, seconds):
    """Return the condition's value once it is true; fail after `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.3)
    pytest.fail(f"waited {seconds} s without success")


def complaints(browser):
    found = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    return [text for text in found if "beforeunload" not in text]  # of a page that the test left without a click


@pytest.mark.parametrize("name", notebooks.NAMES)
def test_run_all_cells_in_jupyterlab(name, lab, browser):
    browser.get(lab % name)
    wait(lambda: browser.execute_script("return !!(window.jupyterapp && document.querySelector('.jp-Notebook'))"), 180)
    wait(lambda: browser.execute_script("return !!jupyterapp.shell.currentWidget?.content?.widgets?.length"), 30)
    wait(lambda: browser.execute_script("return !!jupyterapp.shell.currentWidget.sessionContext?.session?.kernel"), 180)
    browser.execute_script(
        "window.done = ''; jupyterapp.commands.execute('notebook:run-all-cells')"
        ".then(() => window.done = 'yes').catch(error => window.done = String(error))"
    )
    assert wait(lambda: browser.execute_script("return window.done"), 300) == "yes"
    cells = json.loads(browser.execute_script(CELLS))
    assert [count for count, _ in cells] == list(range(1, len(cells) + 1))
    outputs = [output for _, cell in cells for output in cell]
    assert [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"] == []
    pages = [o["data"]["text/html"] for o in outputs if "text/html" in o.get("data", {})]
    assert any("localhost" in "".join(page) and "<iframe" in "".join(page) for page in pages)  # TensorBoard
    for index in [i for i, cell in enumerate(notebooks.read(name).cells) if cell.id in ("load", "curves-figure")]:
        browser.execute_script(f"jupyterapp.shell.currentWidget.content.scrollToItem({index}, 'center')")
        time.sleep(0.5)
    drawn = "return [...document.querySelectorAll('.jp-OutputArea img')].map(image => image.naturalWidth)"
    widths = wait(lambda: browser.execute_script(drawn), 20)
    assert min(widths) > 200
    last = len(notebooks.read(name).cells) - 1  # what has not been drawn yet has no height that a link could reach
    browser.execute_script(f"jupyterapp.shell.currentWidget.content.scrollToItem({last}, 'center')")
    time.sleep(0.5)
    follow_links(browser, 12)
    if name == "MNIST.ipynb":
        draw_a_digit(browser)


def follow_links(browser, sections):
    """Each link of the table of contents brings its section into view.

    Cells that JupyterLab is still drawing above the section push it out of view again; so on a slow machine the test
    clicks again, as a person would.
    """
    page = "jupyterapp.shell.currentWidget.node"  # the other page may still be there
    for number in range(1, sections + 1):
        link = f"{page}.querySelector('.jp-Notebook a[href$=\"#section-{number}\"]')?.click()"
        top = f"return {page}.querySelector('[data-jupyter-id=section-{number}]')?.getBoundingClientRect().top ?? -9999"

        def arrives(link=link, top=top):
            browser.execute_script(link)
            time.sleep(0.5)  # JupyterLab scrolls in its own time
            return -20 < browser.execute_script(top) < browser.get_window_size()["height"]

        wait(arrives, 60)


def draw_a_digit(browser):
    """Draw with the mouse on the pad, and see ten probabilities change."""
    cells = notebooks.read("MNIST.ipynb").cells
    [index] = [i for i, cell in enumerate(cells) if "\nshow_drawing_pad(" in cell.source]
    browser.execute_script(f"jupyterapp.shell.currentWidget.content.scrollToItem({index}, 'center')")
    pad = wait(lambda: browser.find_elements("css selector", ".jp-OutputArea canvas"), 90)[-1]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", pad)
    time.sleep(0.5)
    mouse = webdriver.ActionChains(browser).move_to_element_with_offset(pad, -60, -70).click_and_hold()
    for x, y in [(40, 0), (40, 0), (40, 0), (-20, 50), (-20, 50), (-20, 40)]:
        mouse.move_by_offset(x, y)
    mouse.release().perform()
    labels = (
        "return [...document.querySelectorAll('.widget-label')].map(x => x.textContent).filter(x => x.endsWith('%'))"
    )
    assert len(wait(lambda: browser.execute_script(labels), 90)) == 10


def test_tensorboard_shows_the_reference_runs(browser):
    server = program.TensorBoard()
    server.configure(argv=[None, "--logdir", str(REFERENCE), "--host", "127.0.0.1", "--port", "0"])
    browser.get(f"{server.launch()}#timeseries")
    text = "return document.body.innerText"
    wait(lambda: "accuracy" in browser.execute_script(text), 60)
    shown = browser.execute_script(text)
    assert "cifar" in shown
    assert "mnist" in shown
    wait(lambda: browser.execute_script("return document.querySelectorAll('line-chart').length") >= 2, 30)


@pytest.mark.parametrize("lab_name", ["mnist", "cifar"])
def test_report_of_the_reference_run_is_whole_and_asks_nobody(lab_name, browser, tmp_path):
    run, words = tmp_path / lab_name / "reference", tmp_path / "words.md"
    shutil.copytree(REFERENCE / lab_name, run)
    words.write_text("我的结论", encoding="utf-8")
    path = documents.write_report(run, words=words)
    browser.get_log("browser")
    browser.get(path.as_uri())
    assert complaints(browser) == []
    fetched = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [address for address in fetched if not address.startswith("data:")] == []
    assert min(browser.execute_script("return [...document.images].map(image => image.naturalWidth)")) > 0
    assert all(browser.execute_script("return [...document.images].map(image => image.alt)"))
    text = browser.execute_script("return document.body.innerText")
    assert "test accuracy" in text
    assert "我的结论" in text
    wide = browser.execute_script("return document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wide <= 0  # nothing sticks out of the page
    pdf = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"])
    assert pdf.startswith(b"%PDF")
    assert len(pdf) > 20_000
