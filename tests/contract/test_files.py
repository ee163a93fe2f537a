"""What a bundle's folder holds, and what its model card says."""

from __future__ import annotations

import re
import zipfile

import pytest
import yaml

from common.bundle import BUNDLES_DIR
from common.weights import sha256

REQUIRED = [
    "LICENSE",
    "configs/metadata.json",
    "configs/inference.json",
    "configs/train.json",
    "configs/evaluate.json",
    "configs/logging.conf",
    "docs/README.md",
    "docs/data_license.txt",
    "models/model.pt",
]
HEADINGS = [
    "Overview",
    "Data",
    "Training configuration",
    "Input",
    "Output",
    "Performance",
    "Commands",
    "Limitations",
    "References",
    "License",
]
LARGEST_MB = 25
HOMES = re.compile(r"(?<![\w.])(/home/|/root/|/Users/|/mnt/|/media/|/scratch/|[A-Z]:\\)")
ABSOLUTE = re.compile(r"""(?<![\w.:/<>)}\]@*'"-])/(?!path/)[a-z]\w*/\w""")


def files_of(bundle):
    """What is part of the bundle: not what running it leaves."""
    left = {"eval", "runs", "__pycache__"}
    return [p for p in bundle.rglob("*") if p.is_file() and p.relative_to(bundle).parts[0] not in left]


@pytest.fixture
def card(bundle):
    return (bundle / "docs" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", REQUIRED)
def test_file_is_there(name, bundle):
    path = bundle / name
    assert path.is_file()
    assert path.stat().st_size > 0


def test_no_file_is_too_large_for_the_model_zoo(bundle):
    assert not [path for path in files_of(bundle) if path.stat().st_size > LARGEST_MB * 2**20]


def test_model_pt_has_the_shortest_name(bundle):
    """MONAI Label loads the weights with the shortest name."""
    names = [path.name for path in (bundle / "models").glob("*.pt")]
    assert min(names, key=len) == "model.pt"
    assert [len(name) for name in names].count(len("model.pt")) == 1


def test_no_python(bundle):
    assert not [path for path in files_of(bundle) if path.suffix in {".py", ".pyc", ".ipynb", ".so"}]


def text_of_weights(path):
    """What is not a tensor in it; the bytes of a tensor may be anything."""
    with zipfile.ZipFile(path) as archive:
        members = [name for name in archive.namelist() if "/data/" not in name]
        return "\n".join([*members, *(archive.read(name).decode("latin-1") for name in members)])


def test_no_paths_of_somebodys_machine(bundle):
    for path in files_of(bundle):
        text = text_of_weights(path) if path.suffix == ".pt" else path.read_text(encoding="utf-8")
        assert not HOMES.search(text), path
        if path.suffix in {".md", ".txt"}:
            assert not ABSOLUTE.search(text), path


def test_card_has_all_headings_in_order(card):
    found = re.findall(r"^#{1,3} (?:Model )?(.+?)\s*$", card, flags=re.MULTILINE)
    assert [heading for heading in found if heading in HEADINGS] == HEADINGS


def test_card_begins_with_what_model_hubs_read(card, metadata):
    """The licence of the weights by the hubs' name of it, and how the model is found."""
    _, front, text = card.split("---\n", 2)
    about = yaml.safe_load(front)
    assert about["license"] == metadata["weights_license"].lower().replace(" ", "-")
    assert about["library_name"] == "monai"
    assert about["pipeline_tag"] == "image-segmentation"
    assert {"monai", "medical", "anomaly-detection", {"MR": "mri", "CT": "ct"}[metadata["modality"]]} <= set(
        about["tags"]
    )
    assert text.startswith("\n# ")


def test_card_is_finished(card):
    assert not re.search(r"@@|\bTODO\b|\bTBD\b|\bFIXME\b|lorem ipsum", card, flags=re.IGNORECASE)
    sections = re.split(r"^#{1,3} .+$", card, flags=re.MULTILINE)[2:]
    assert all(section.strip() for section in sections)


def test_card_is_of_these_weights(card, bundle):
    assert re.findall(r"\b[0-9a-f]{64}\b", card) == [sha256(bundle / "models" / "model.pt")]


def test_changelog_names_the_method(bundle):
    changelog = (BUNDLES_DIR.parent / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"\b{re.escape(bundle.name)}\b", changelog)
