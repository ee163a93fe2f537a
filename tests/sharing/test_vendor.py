"""The part of the package that a bundle's configs need, found without running it."""

from __future__ import annotations

import pytest

from common.errors import BundleError
from common.sharing.vendor import PACKAGE, bundle_config, is_config, named_modules, standalone_config, vendored_files

REWRITTEN = {
    b'"_target_": "common.methods.dae.DAE"': b'"_target_": "scripts._common.methods.dae.DAE"',
    b'"$common.weights.sha256(@file)"': b'"$scripts._common.weights.sha256(@file)"',
    b'"$(common.workflows.batch.OK, common.files)"': b'"$(scripts._common.workflows.batch.OK, scripts._common.files)"',
    b'"$import common"': b'"$import scripts._common"',
    b'"$import common as c"': b'"$import scripts._common as c"',
    b'"$import common.weights"': b'"$import scripts._common.weights"',
    b'"$from common import weights"': b'"$from scripts._common import weights"',
    b'"$from common.weights import sha256"': b'"$from scripts._common.weights import sha256"',
    b"_target_: common.workflows.engines.run_or_exit\n": b"_target_: scripts._common.workflows.engines.run_or_exit\n",
}
LEFT = [b'"@common.a"', b'"uncommon.b"', b'"a.common.b"', b'"in common."', b'"common": 1', b'"monai.common"']


@pytest.mark.parametrize("config", REWRITTEN)
def test_config_is_rewritten_and_back(config):
    assert standalone_config(config) == REWRITTEN[config]
    assert bundle_config(REWRITTEN[config]) == config


@pytest.mark.parametrize("config", LEFT)
def test_other_words_stay(config):
    assert standalone_config(config) == config
    assert named_modules(config, "") == set()


def test_what_is_named():
    config = (
        b'{"a": "common.methods.dae.DAE", "b": "$from common.weights import sha256, digest", "c": "common.cli.app"}'
    )
    assert named_modules(config, "") >= {
        ("methods", "dae", "DAE"),
        ("weights", "sha256"),
        ("weights", "digest"),
        ("cli", "app"),
    }


@pytest.mark.parametrize("name", ["common.nothing.X", "common.methods.dae.Nothing", "common.methods.nothing.X"])
def test_what_is_not_there_is_refused(name):
    with pytest.raises(BundleError, match=rf"^inference.json: names {name}, which"):
        vendored_files({"inference.json": f'"{name}"'.encode()})


def test_metadata_is_no_config():
    assert is_config("configs/train.json")
    assert is_config("configs/train.yaml")
    assert not is_config("configs/metadata.json")
    assert not is_config("configs/logging.conf")


def test_modules_are_followed_through_relative_imports():
    files = vendored_files({"train.json": b'"common.methods.vae.VAE"'})
    methods = {place for place in files if place.startswith("methods/")}
    assert methods == {"methods/__init__.py", "methods/vae.py", "methods/ae.py"}
    assert "detection/method.py" in files
    assert all(content == (PACKAGE / place).read_bytes() for place, content in files.items())


def test_imports_inside_functions_and_of_modules_are_followed(tmp_path, monkeypatch):
    modules = {
        "__init__.py": "",
        "a.py": "def f():\n    from .sub import b\n    return b",
        "sub/__init__.py": "from .c import C",
        "sub/b.py": "from .. import d",
        "sub/c.py": "C = 1",
        "d.py": "import e",
        "e.py": "",
    }
    for place, text in modules.items():
        (tmp_path / "pack" / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pack" / place).write_text(text, encoding="utf-8")
    monkeypatch.setattr("common.sharing.vendor.PACKAGE", tmp_path / "pack")
    monkeypatch.setattr("common.sharing.vendor.named_modules", lambda config, source: {("a", "f")})
    assert set(vendored_files({"": b""})) == set(modules) - {"e.py"}


def test_data_come_if_they_are_named():
    sample = b'"common.cohorts.table.sample_dir", "$@dataset_dir + \'/mni152_lesions_T1.nii.gz\'"'
    data = {place for place in vendored_files({"": sample}) if not place.endswith(".py")}
    assert data == {"cohorts/sample/mni152_lesions_T1.nii.gz", "cohorts/sample/LICENSE"}
    template = vendored_files({"": b'"common.transforms.registration.RegisterToMNId"'})
    data = {place for place in template if not place.endswith(".py")}
    assert data == {"images/template/mni152_T1_2mm.nii.gz", "images/template/LICENSE"}
