"""The course as a static site: `make site` writes the committed notebooks to runs/site/html/.

Sphinx reads the repository as it lies there. The notebooks keep their stored outputs, and nothing
is executed. No page loads anything from another host, so the site also opens from a file.
"""

import base64
import hashlib
import json
import os
import re
import shutil
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WIDGET = "application/vnd.jupyter.widget-view+json"
NOTE = (
    "*Here the notebook has a panel to move. A page cannot compute, so the panel is left out; the "
    "picture above shows how it begins.*"
)


def notebooks(pattern):
    """Return the notebooks of a pattern in the order of the course: 00 to 09, then A1."""
    return sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern))


CONTENTS = {
    "Lessons": notebooks("notebooks/*.ipynb"),
    "Exercises": notebooks("notebooks/exercises/*.ipynb"),
    "Solutions": notebooks("notebooks/solutions/*.ipynb"),
    "To look up": [
        "notebooks/cheat_sheet.md",
        "notebooks/by_hand.md",
        "notebooks/glossary.md",
        "helpers/cli/README.md",
        "configs/README.md",
        "data/README.md",
    ],
    "What stands behind it": [
        "notebooks/the_document.md",
        "data/experiments/README.md",
        "data/benchmarks/README.md",
    ],
    "The repository": ["notebooks/README.md", "helpers/README.md", "CONTRIBUTING.md"],
}

project = "SAM3 LoRA workbook"
author = "The SAM3 LoRA workbook team"
root_doc = "README"
extensions = ["myst_nb"]
include_patterns = ["README.md", *(page for part in CONTENTS.values() for page in part)]
exclude_patterns = [".*", "runs", "build", "tests"]
smartquotes = False  # would turn the two dashes of an option into one

nb_execution_mode = "off"
nb_merge_streams = True
nb_ipywidgets_js = {}  # scripts of another host; `page_source` puts a note where a panel was
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4

html_theme = "furo"
html_title = project
html_show_copyright = False
html_copy_source = False
html_show_search_summary = False  # would be fetched, which a browser refuses to a page from a file
html_math_renderer = "mathml"  # MathJax would come from another host
html_static_path = ["static"]
html_css_files = ["course.css"]

alternative_texts = {}  # hash of a picture to the text that the notebook stores with it


def table_of_contents():
    """Return the directives that put `CONTENTS` into the bar at the side."""
    lines = []
    for caption, part in CONTENTS.items():
        lines += ["", "```{toctree}", ":hidden:", f":caption: {caption}", ""]
        for page in part:
            solved = f"Solution {Path(page).name[:2]}"  # its title is that of the exercise
            lines.append(f"{solved} </{page}>" if caption == "Solutions" else f"/{page}")
        lines += ["```", ""]
    return "\n".join(lines)


def link_to_page(link, folder):
    """Return a link to a folder as one to the nearest README.md, in it or above it."""
    target = (folder / link[1]).resolve()
    if not target.is_dir():
        return link[0]
    pages = (place / "README.md" for place in (target, *target.parents))
    return f"]({os.path.relpath(next(filter(Path.is_file, pages)), folder)})"


def without_panels(notebook):
    """Put its still and a note where a notebook has a panel, and keep the texts of all pictures."""
    for cell in notebook["cells"]:
        outputs = []
        for output in cell.get("outputs", []):
            is_panel = WIDGET in output.get("data", {})
            if is_panel:
                for part in ("data", "metadata"):
                    kept = {kind: value for kind, value in output[part].items() if is_picture(kind)}
                    output[part] = kept
            for kind, stored in output.get("metadata", {}).items():
                if is_picture(kind) and "alt" in stored:
                    picture = base64.b64decode(output["data"][kind])
                    alternative_texts[hashlib.sha256(picture).hexdigest()] = stored["alt"]
            if not is_panel or output["data"]:
                outputs.append(output)
            if is_panel:
                note = {"text/markdown": NOTE}
                outputs.append({"output_type": "display_data", "data": note, "metadata": {}})
        if "outputs" in cell:
            cell["outputs"] = outputs
    return notebook


def is_picture(kind):
    """Tell whether a MIME type is that of a picture."""
    return kind.startswith("image/")


def page_source(app, name, source):
    """Prepare the source of a page before Sphinx reads it."""
    path = Path(app.env.doc2path(name))
    if path.suffix == ".ipynb":
        source[0] = json.dumps(without_panels(json.loads(source[0])))
        return
    links = re.compile(r"\]\(([\w./-]+)\)")
    source[0] = links.sub(lambda link: link_to_page(link, path.parent), source[0])
    if name == root_doc:
        source[0] += table_of_contents()


def picture_texts(app, tree):
    """Give the pictures of a notebook their alternative texts; MyST-NB names a file by its hash."""
    for node in tree.findall(lambda node: node.tagname == "image"):
        text = alternative_texts.get(Path(node["uri"]).stem)
        if text:
            node["alt"] = text


def formula(translator, node):
    """Write a formula as MathML, which browsers draw without a script."""
    docutils = import_module("docutils.nodes")  # comes with Sphinx, which the lock does not have
    latex = import_module("docutils.utils.math.latex2mathml")
    translator.body.append(latex.tex2mathml(node.astext(), node.tagname == "math_block"))
    raise docutils.SkipNode


def second_name(app, error):
    """Give the home page the name that servers open, beside its own."""
    if error is None:
        shutil.copy(app.outdir / f"{root_doc}.html", app.outdir / "index.html")


def setup(app):
    """Connect the steps that Sphinx has no setting for."""
    app.add_html_math_renderer("mathml", (formula, None), (formula, None))
    app.connect("source-read", page_source)
    app.connect("doctree-read", picture_texts)
    app.connect("build-finished", second_name)
