"""What grading writes: a table, a page for the instructor, and a page for each student."""

import csv
import html
from pathlib import Path

LABS = ("MNIST", "CIFAR")


def harmless(value) -> str:
    """A cell that no spreadsheet takes for a formula."""
    text = str(value)
    return f"'{text}" if text.lstrip().startswith(("=", "+", "-", "@")) else text


def write_table(results: list[dict], worth: dict, most: float, path: Path) -> None:
    """Write grades.csv; `worth` are the points of each exercise."""
    names = list(dict.fromkeys(name for one in results for name in one["points"]))
    more = list(dict.fromkeys(name for one in results for name in one["row"]))
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["student", *names, "total", "max", *(f"{name} message" for name in worth), *more])
        for one in results:
            points = [one["points"][name] for name in names]
            texts = [one["said"][name] for name in worth] + [one["row"].get(name, "") for name in more]
            writer.writerow([harmless(one["student"]), *points, sum(points), most, *map(harmless, texts)])


STYLE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: {width}; padding: 0 1em; color: #222 }}
table {{ border-collapse: collapse; margin: 1em 0 }}
th, td {{ padding: .3em .6em; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top }}
th {{ background: #f3f3f3 }} td {{ overflow-wrap: anywhere }} td:first-child {{ white-space: nowrap }}
th.sort {{ cursor: pointer; position: sticky; top: 0 }} #grades {{ font-size: 13px }}
#grades th, #grades td {{ padding: .25em .4em }}
.no {{ color: #b02a00 }} .yes {{ color: #006b4f }} .number {{ text-align: right; white-space: nowrap }}
.bar {{ background: #0072B2; height: 1em }} .track {{ background: #e5e5e5; width: 16em }}
pre {{ white-space: pre-wrap; background: #f6f6f6; padding: .8em }}
</style><h1>{title}</h1>
"""
SORT = """<script>
document.querySelectorAll("th.sort").forEach((head, column) => head.onclick = () => {
  const body = document.querySelector("#grades tbody"), up = head.dataset.up = head.dataset.up === "1" ? "0" : "1";
  const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const order = (a, b) => key(a).localeCompare(key(b), undefined, {numeric: true}) * (up === "1" ? 1 : -1);
  [...body.rows].sort(order).forEach(row => body.append(row));
});
</script>
"""


def write_pages(results: list[dict], worth: dict, most: float, out: Path, said: str) -> None:
    """Write grades.html and the feedback for each student."""
    text = lambda value: html.escape(str(value))  # noqa: E731
    names = list(dict.fromkeys(name for one in results for name in one["points"]))
    parts = [STYLE.format(title="Grades", width="100em"), f"<p>{text(said)}</p><h2>Solved</h2><table>"]
    for name in names:
        solved = sum(one["points"][name] > 0 for one in results)
        share = 100 * solved / max(1, len(results))
        bar = f'<div class="track"><div class="bar" style="width: {share:.0f}%"></div></div>'
        parts.append(f'<tr><td>{name}<td>{bar}<td class="number">{solved} of {len(results)}</tr>')
    heads = ["student", *names, f"of {most:g}", *(f"{lab} %" for lab in LABS), "remarks"]
    parts += ["</table><h2>Students</h2><p>Click a heading to sort, a name for the messages of the checks.</p>"]
    parts += ['<table id="grades"><thead><tr>', *(f'<th class="sort">{text(head)}' for head in heads)]
    parts += ["</thead><tbody>"]
    for one in results:
        row = one["row"]
        parts.append(f'<tr><td><a href="feedback/{one["page"]}.html">{text(one["student"])}</a>')
        for name in names:
            points, why = one["points"][name], text(one["said"].get(name, ""))
            parts.append(f'<td class="number {"yes" if points else "no"}" title="{why}">{points:g}')
        parts.append(f'<td class="number"><b>{sum(one["points"].values()):g}</b>')
        notes = [row["remarks"]] * bool(row["remarks"])
        for lab in LABS:
            parts.append(f'<td class="number">{text(row.get(f"{lab} accuracy", ""))}')
            for what in ("source", "ready-made", "smoke run"):
                if (value := row.get(f"{lab} {what}", "")) not in ("", "none found"):
                    notes.append(f"{lab}, {value}" if what == "source" else f"{lab}, {what}: {value}")
        parts.append(f"<td>{text('; '.join(notes))}")
    (out / "grades.html").write_text("\n".join([*parts, "</tbody></table>", SORT]), encoding="utf-8")
    for one in results:
        total = sum(one["points"].values())
        parts = [STYLE.format(title=text(one["student"]), width="60em"), f"<p><b>{total:g} of {most:g} points</b></p>"]
        parts.append("<table><tr><th>exercise<th>points<th>what the check says</tr>")
        for name, points in worth.items():
            right = one["points"][name] > 0
            mark = f'<td class="{"yes" if right else "no"}">{"✓" if right else "✗"} {text(one["said"][name])}'
            parts.append(f'<tr><td>{name}<td class="number">{one["points"][name]:g} of {points:g}{mark}</tr>')
        parts.append("</table><h2>As handed in</h2><table>")
        facts = {key: value for key, value in one["row"].items() if value != ""}
        parts += [f"<tr><th>{text(key)}<td>{text(value)}</tr>" for key, value in facts.items()]
        parts.append("</table>")
        for lab, words in one["words"].items():
            parts += [f"<h2>In your own words, {lab}</h2><pre>{text(words[:5000])}</pre>"] if words else []
        (out / "feedback" / f"{one['page']}.html").write_text("\n".join(parts), encoding="utf-8")
