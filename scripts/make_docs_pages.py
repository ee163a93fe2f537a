"""The pages of the documentation that are made of what stands elsewhere; run by `mkdocs build`, see mkdocs.yml.

The README is the start page; the READMEs of the apps, the notebooks and the model cards are pages; the docstrings of
each package of `common` are one page of the reference. Links between them lead to the pages.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import mkdocs_gen_files as pages

ROOT = Path(__file__).resolve().parents[1]
APPS = ("monai_label", "monai_deploy")
FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
LINK = re.compile(r"\]\((?!https?://|#|mailto:)([^)#]+)(#[^)]*)?\)")


def write(page: str, text: str, source: Path, more: str = "") -> None:
    """A page whose text stands in `source`; a link to a file that is no page becomes the name of the file.

    more: text for its end, with links as of the page.
    """
    depth = "../" * page.count("/")

    def moved(match: re.Match[str]) -> str:
        target = (source.parent / match[1]).resolve().relative_to(ROOT).as_posix()
        there = page_of(target)
        return f"] (`{target}`)" if there is None else f"]({depth}{there}{match[2] or ''})"

    with pages.open(page, "w") as file:
        file.write(re.sub(r"\[([^\]]*)\] \(", r"\1 (", LINK.sub(moved, FRONT_MATTER.sub("", text))) + more)
    pages.set_edit_path(page, source.relative_to(ROOT).as_posix())


def notebook_text(notebook: Path) -> str:
    """A notebook as Markdown."""
    parts = []
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "code":
            kind, text = ("sh", text.partition("\n")[2]) if text.startswith("%%bash") else ("python", text)
            text = f"```{kind}\n{text}\n```"
        parts.append(text)
    return "\n\n".join(parts)


def stages_of(bundle: Path) -> str:
    """The picture of scripts/make_stage_pictures.py, and how to draw one; links as of the bundle's card."""
    own = bundle.name
    config = json.loads((bundle / "configs" / "inference.json").read_text(encoding="utf-8"))
    scans = re.findall(r"\w+\.nii\.gz", json.dumps(config["image"]))
    said = (
        "What the method does with one slice of the sample, whose lesions are simulated. The map is that of the slice, "
        "before the smoothing and the normalisation of the whole volume; it is drawn up to its own maximum, so that "
        "something is bright in a healthy slice too."
    )
    if len(scans) > 1:
        said += " Of the modalities the rows below the first show the first."
    picture = f"../../../docs/methods/{own}.png"
    command = f"uad sample\nuad figures {own} {' '.join(f'sample/{name}' for name in scans)} -o {own}.png"
    shown = f"[![Input, stages, reconstruction and anomaly map]({picture})]({picture})"  # a click makes it larger
    return f"## Its stages\n\n{shown}\n\n{said}\n\n```sh\n{command}\n```\n\n"


def code_of(bundle: Path) -> str:
    """Where the classes of a bundle's method are in the reference: the formulas, and the lines that compute them."""
    configs = [bundle / "configs" / "inference.json", *sorted((bundle / "configs").glob("train*.json"))]
    text = "".join(path.read_text(encoding="utf-8") for path in configs)
    classes = dict.fromkeys(re.findall(r"common\.(?:methods|networks)\.\w+\.\w+", text))
    lines = [f"* [`{name}`](../reference/{name.split('.')[1]}.md#{name})" for name in classes]
    said = "Each class says its formulas, and shows under *Source code* the lines that compute them."
    own, paper = bundle.name, ROOT / "docs" / "paper_configs.md"
    anchors = re.findall(rf"^## `({own}/(\w+)\.json)`", paper.read_text(encoding="utf-8"), re.MULTILINE)
    numbers = [f"* [whose numbers `{name}` holds](../paper_configs.md#{own}{file}json)" for name, file in anchors]
    return "\n".join(["## In the code", "", said, "", *lines, *numbers, ""])


def page_of(target: str) -> str | None:
    """The page of a file of the repository, if it has one."""
    if target == "README.md":
        return "index.md"
    if match := re.fullmatch(r"apps/(\w+)/README\.md", target):
        return f"apps/{match[1]}.md"
    if match := re.fullmatch(r"bundles/(\w+)/docs/README\.md", target):
        return f"methods/{match[1]}.md"
    if match := re.fullmatch(r"docs/(tutorials/\w+)\.ipynb", target):
        return f"{match[1]}.md"
    return target.removeprefix("docs/") if target.startswith("docs/") else None


def fill_navigation(section: str, names: list[str]) -> None:
    """Let a section of the navigation, which mkdocs.yml gives as a folder, list the pages in it."""
    (entry,) = (entry for entry in pages.config["nav"] if section in entry)
    entry[section] = [{name: f"{section.lower()}/{name}.md"} for name in names]


write("index.md", (ROOT / "README.md").read_text(encoding="utf-8"), ROOT / "README.md")
for app in APPS:
    readme = ROOT / "apps" / app / "README.md"
    write(f"apps/{app}.md", readme.read_text(encoding="utf-8"), readme)
cards = sorted(ROOT.glob("bundles/*/docs/README.md"))
for card in cards:
    bundle = card.parents[1]
    overview, data, rest = card.read_text(encoding="utf-8").partition("## Data\n")
    write(f"methods/{bundle.name}.md", overview + stages_of(bundle) + data + rest, card, code_of(bundle))
for notebook in sorted(ROOT.glob("docs/tutorials/*.ipynb")):
    itself = f"\n\n[This page as a notebook]({notebook.name})\n"
    write(f"tutorials/{notebook.stem}.md", notebook_text(notebook), notebook, itself)
rooms = {"api": ["common.api"]}
for room in sorted(path.parent for path in (ROOT / "common").glob("*/__init__.py")):
    modules = [f"common.{room.name}.{path.stem}" for path in sorted(room.glob("*.py")) if path.stem != "__init__"]
    if modules:
        rooms[room.name] = modules
for room_name, modules in rooms.items():
    title = "common" if room_name == "api" else f"common.{room_name}"
    with pages.open(f"reference/{room_name}.md", "w") as file:
        file.write("\n\n".join([f"# {title}", *(f"::: {module}" for module in modules)]) + "\n")
fill_navigation("Methods", [card.parents[1].name for card in cards])
fill_navigation("Reference", list(rooms))
