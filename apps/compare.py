"""The anomaly map of each bundle's sample by every way that it is run, and with other versions of the libraries.

    python apps/compare.py mad_ad berdiff --alone build/alone --label label/environment --deploy ~/deploy --write
    python apps/compare.py --oldest build/oldest
    python apps/compare.py --table

Printed: a row a bundle, with the largest difference of the map to that of this environment by each way whose
environment is given, see `ROADS`; 0 is the same bits. The exit code is 1 where one is above the bundle's tolerance.
`--write` keeps the rows in docs/export.json and puts the table into docs/export.md; `--table` does the latter alone,
for after the weights of a bundle changed.

The environment of `--alone` is made, with the exported bundles' own `requirements.txt` and nothing else, where it is
missing; that of `--oldest` is made by oldest.sh, the other two as the READMEs beside this file say. MONAI Label and
MONAI Deploy are asked for the bundles for brain T1 only. MONAI Deploy reads the sample as a DICOM series, and so does
the run that it is compared with.
"""

from __future__ import annotations

import json
import os
import runpy
import shlex
import socket
import subprocess
import sys
import time
import venv
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any
from urllib.request import urlopen

import nibabel as nib
import numpy as np
import torch
import typer

from common.bundle import BUNDLES_DIR, available_bundles, load_workflow, metadata
from common.cohorts.table import sample_dir
from common.errors import UADError
from common.files import replacing
from common.weights import sha256

HERE = Path(__file__).parent
ROOT = HERE.parent
PAGE = ROOT / "docs" / "export.md"
MARKERS = "<!-- roads: apps/compare.py -->", "<!-- roads end -->"
ROADS = {
    "alone": "exported zip",
    "label": "MONAI Label",
    "deploy": "MONAI Deploy",
    "oldest": "oldest versions",
    "last_bit": "last bit of the image",
}
PACKAGES = ("numpy", "scipy", "simpleitk", "monai", "torch")  # what can change a bit
TOLERANCE = 1e-4  # of the highest value of the map
# bundles whose method decides inside: where a decision falls the other way, the map around it is another one. Of its
# voxels this share may differ by more than the tolerance
DECIDING_SHARE = 0.02
DECIDING = (
    "ar_transformer",
    "ar_transformer_headct",
    "auto_ddpm",
    "berdiff",
    "berdiff_glioma",
    "iter_mask2",
    "latent_ddpm",
    "latent_ddpm_headct",
    "mad_ad",
)
IMAGE = Path(sample_dir()) / "mni152_lesions_T1.nii.gz"
NAME = IMAGE.name.removesuffix(".nii.gz")
STARTED_WITHIN_S = 600
RUN = (
    "import sys; from common.bundle import run_inference; "
    "[run_inference(key, ['inference.json'], output_dir=f'{sys.argv[1]}/{key}') for key in sys.argv[2:]]"
)
VERSIONS = f"from importlib.metadata import version; print(*(version(name) for name in {PACKAGES}))"


def main(
    keys: Annotated[list[str] | None, typer.Argument(help="Bundles; default: all.")] = None,
    alone: Annotated[Path | None, typer.Option(help="Environment of the exported bundles.")] = None,
    label: Annotated[Path | None, typer.Option(help="Environment of MONAI Label.")] = None,
    deploy: Annotated[Path | None, typer.Option(help="Environment of MONAI Deploy.")] = None,
    oldest: Annotated[Path | None, typer.Option(help="Environment with the oldest versions.")] = None,
    write: Annotated[bool, typer.Option("--write", help="Keep the rows, and put the table into the page.")] = False,
    table: Annotated[bool, typer.Option("--table", help="Only put the table of the kept rows into the page.")] = False,
) -> None:
    """Print the table."""
    if table:
        write_page(read_rows())
        return
    given = {"alone": alone, "label": label, "deploy": deploy, "oldest": oldest}
    environments = {road: path.expanduser().resolve() for road, path in given.items() if path}
    rows = {}
    try:
        for key, row in measure(keys or available_bundles(), environments):
            rows[key] = row
            if write:  # at once: the next may take minutes, and fail
                keep({key: row})
    except UADError as error:
        raise typer.BadParameter(str(error)) from None
    print(as_table(rows))
    if worse := [f"{key} by {ROADS[road]}" for key, road in above_tolerance(rows)]:
        raise SystemExit(f"above the tolerance: {', '.join(worse)}")


def measure(keys: list[str], environments: Mapping[str, Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The bundles' keys, each with its row. Raises UADError."""
    of_t1 = [key for key in keys if metadata(key)["modalities"] == ["T1"]]
    ways = {"alone": run_alone, "label": run_label, "deploy": run_deploy}
    with TemporaryDirectory() as folder:
        work = Path(folder)
        if "oldest" in environments:
            old = python(environments["oldest"])
            call(f"{old} -c {shlex.quote(RUN)} {work}/oldest {shlex.join(keys)}", work, PYTHONPATH=str(ROOT))
        if "deploy" in environments:
            call(f"{python()} {HERE}/monai_deploy/make_dicom.py {work}/series")
        with server(work, environments.get("label"), of_t1):
            for key in keys:
                here = run_here(key, work / "here")
                found = {"last_bit": difference(here, run_here(key, work / "nudged", nudge=True))}
                for road, environment in environments.items():
                    if road == "oldest":
                        found[road] = difference(here, map_in(work / "oldest" / key))
                    elif road == "alone" or key in of_t1:
                        base = run_here(key, work / "of_series", image=work / "series") if road == "deploy" else here
                        found[road] = difference(base, ways[road](key, work, environment))
                compared = {road: versions(path) for road, path in environments.items() if road in found}
                row = {
                    "weights_sha256": sha256(BUNDLES_DIR / key / "models" / "model.pt"),
                    "highest": float(np.asanyarray(here.dataobj).max()),
                    "roads": found,
                    "versions": {"here": versions(), **compared},
                }
                yield key, row


def keep(rows: Mapping[str, Any]) -> None:
    """Put new rows into docs/export.json, and the table into the page."""
    kept = joined(read_rows(), rows)
    with replacing(PAGE.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    write_page(kept)


def write_page(rows: Mapping[str, Any]) -> None:
    """Put the table of these rows into docs/export.md."""
    text = page(rows)
    with replacing(PAGE) as temporary:
        temporary.write_text(text, encoding="utf-8")


def joined(kept: Mapping[str, Any], rows: Mapping[str, Any]) -> dict[str, Any]:
    """New rows over those that were kept; what was not measured again stays where the weights are the same."""
    result = dict(kept)
    for key, row in rows.items():
        old = kept.get(key, {})
        same = old.get("weights_sha256") == row["weights_sha256"]
        result[key] = row | {part: (old[part] if same else {}) | row[part] for part in ("roads", "versions")}
    return dict(sorted(result.items()))


def above_tolerance(rows: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Bundle and way of each difference that is too large; what a changed image does is told, not judged."""
    return [
        (key, road)
        for key, row in rows.items()
        for road, found in row["roads"].items()
        if road != "last_bit" and found["share"] > (DECIDING_SHARE if key in DECIDING else 0)
    ]


def read_rows() -> dict[str, Any]:
    """The rows that were kept."""
    path = PAGE.with_suffix(".json")
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def page(rows: Mapping[str, Any]) -> str:
    """The text of docs/export.md with the table of these rows."""
    with_table = runpy.run_path(str(ROOT / "scripts" / "make_methods_table.py"))["with_table"]
    return with_table(PAGE, MARKERS, as_table(rows))


def as_table(rows: Mapping[str, Any]) -> str:
    """In Markdown, and below it the versions that were compared."""
    lines = [["bundle", "highest value", *ROADS.values()], ["---"] * (2 + len(ROADS))]
    for key, row in rows.items():
        path = BUNDLES_DIR / key / "models" / "model.pt"
        is_old = not path.is_file() or sha256(path) != row["weights_sha256"]
        name = f"{key} (measured with older weights)" if is_old else key
        lines.append([name, f"{row['highest']:.4g}", *(cell(row["roads"].get(road)) for road in ROADS)])
    compared = {
        f"{'this repository' if road == 'here' else ROADS[road]}: "
        + ", ".join(f"{name} {version}" for name, version in zip(PACKAGES, of_road, strict=True))
        for row in rows.values()
        for road, of_road in row["versions"].items()
    }
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", *(f"* {text}" for text in sorted(compared))])


def cell(found: Mapping[str, float] | None) -> str:
    """`0`, `2e-08`, or with the share of the voxels that differ, `0.03 (0.12 % of the voxels)`; a dash for none."""
    if found is None:
        return "-"
    largest = f"{found['largest']:.2g}"
    return largest if found["share"] == 0 else f"{largest} ({100 * found['share']:.2g} % of the voxels)"


def run_here(key: str, output: Path, image: Path | None = None, nudge: bool = False) -> nib.Nifti1Image:
    """The bundle as it lies in this repository, on its sample or another image.

    nudge: the network is given each voxel of the prepared image as the next smaller float32 number.
    """
    given = {} if image is None else {"image": str(image)}
    workflow = load_workflow(key, ["inference.json"], output_dir=str(output / key), **given)
    workflow.initialize()
    evaluator = workflow.parser.get_parsed_content("evaluator")
    if nudge:
        evaluator.network.register_forward_pre_hook(lambda _, images: (nudged(images[0]),))
    evaluator.run()
    return map_in(output / key)


def nudged(image: torch.Tensor) -> torch.Tensor:
    """Every voxel that is not 0 as the float32 number that is next to it towards 0."""
    return torch.nextafter(image, torch.zeros_like(image))


def map_in(output: Path) -> nib.Nifti1Image:
    """The map of the only case in a folder of results."""
    return nib.load(next(output.rglob("anomaly_map.nii.gz")))


def versions(environment: Path | str = sys.prefix) -> list[str]:
    """Of `PACKAGES` in an environment."""
    done = subprocess.run([python(environment), "-c", VERSIONS], capture_output=True, text=True, check=True)  # noqa: S603
    return done.stdout.split()


def run_alone(key: str, work: Path, environment: Path) -> nib.Nifti1Image:
    """The archive, unpacked, from another folder, without this repository on any path."""
    work = work / "of_alone" / key
    call(f"{python()} -m common export {key} -o {work}/exported")
    with zipfile.ZipFile(work / "exported" / f"{key}.zip") as archive:
        archive.extractall(work / "alone")
    if not environment.exists():
        venv.create(environment, with_pip=True)
        call(f"{python(environment)} -m pip install -r {work}/alone/{key}/requirements.txt")
    config = f"{work}/alone/{key}/configs/inference.json"
    command = f"{python(environment)} -m monai.bundle run --config_file {config} --output_dir {work}/alone/out"
    call(command, cwd=work, PYTHONPATH="")
    return map_in(work / "alone" / "out")


def run_label(key: str, work: Path, environment: Path) -> nib.Nifti1Image:
    """The float map of the server that is up."""
    address, output = (work / "address").read_text(encoding="utf-8"), work / f"{key}_label.nii.gz"
    url = shlex.quote(f"{address}/infer/{key}?image={NAME}&output=image")
    call(f"curl -sf -X POST {url} -F 'params={{\"save_map\": true}}' -o {output}")
    return nib.load(output)


def run_deploy(key: str, work: Path, environment: Path) -> nib.Nifti1Image:
    """The DICOM Parametric Map of the application."""
    decode = runpy.run_path(str(HERE / "monai_deploy" / "test_app.py"))["decode"]  # DICOM to an image in RAS
    libraries = next(environment.glob("lib/python*/site-packages/nvidia/cu13")) / "lib"
    output = work / "of_deploy" / key
    command = f"{python(environment)} {HERE}/monai_deploy/app -i {work}/series -m {BUNDLES_DIR / key} -o {output}"
    call(f"ulimit -s 32768 && {command}", LD_LIBRARY_PATH=str(libraries))
    return decode(output / "anomaly_map.dcm")


@contextmanager
def server(work: Path, environment: Path | None, keys: list[str]) -> Iterator[None]:
    """MONAI Label with these bundles, its address in the file `address` in `work`; nothing without an environment."""
    if environment is None:
        yield
        return
    call(f"{HERE}/monai_label/prepare.sh {work}/app {shlex.join(keys)}", PATH=path_of(sys.prefix))
    (work / "studies").mkdir()
    (work / "studies" / IMAGE.name).symlink_to(IMAGE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = ["monailabel", "start_server", "--app", "app", "--studies", "studies"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with (work / "server.log").open("wb") as log:
        started = subprocess.Popen(  # noqa: S603 - MONAI Label's own
            command,
            cwd=work,
            env=surroundings(PATH=path_of(environment)),
            stdout=log,
            stderr=log,
        )
    try:
        until = time.monotonic() + STARTED_WITHIN_S
        while not answers(f"{address}/info/"):
            if started.poll() is not None or time.monotonic() > until:
                raise SystemExit((work / "server.log").read_text())
            time.sleep(1)
        (work / "address").write_text(address, encoding="utf-8")
        yield
    finally:
        started.terminate()
        started.wait()


def answers(url: str) -> bool:
    """Whether the server is up."""
    try:
        with urlopen(url, timeout=5):  # noqa: S310 - http, at 127.0.0.1
            return True
    except OSError:
        return False


def difference(one: nib.Nifti1Image, other: nib.Nifti1Image) -> dict[str, float]:
    """The `largest` over the voxels, and the `share` of those above 0 that differ by more than the tolerance.

    Raises ValueError where the grids differ.
    """
    one, other = nib.as_closest_canonical(one), nib.as_closest_canonical(other)
    if one.shape != other.shape or not np.allclose(one.affine, other.affine, atol=1e-4):
        raise ValueError(f"grids differ: {one.shape} {other.shape}\n{one.affine}\n{other.affine}")
    before, after = (np.asarray(image.dataobj, dtype=np.float64) for image in (one, other))
    apart = np.abs(before - after)
    share = (apart > TOLERANCE * before.max()).sum() / max(((before > 0) | (after > 0)).sum(), 1)
    return {"largest": float(apart.max()), "share": float(share)}


def path_of(environment: Path | str) -> str:
    """Its folder of commands."""
    return f"{environment}/bin"


def python(environment: Path | str = sys.prefix) -> str:
    """The interpreter of an environment; default: this one's."""
    return f"{path_of(environment)}/python"


def surroundings(**variables: str) -> dict[str, str]:
    """Environment variables; what is given as PATH comes first in it."""
    if "PATH" in variables:
        variables["PATH"] += f":{os.environ['PATH']}"
    return {**os.environ, **variables}


def call(command: str, cwd: Path = ROOT, **variables: str) -> None:
    """Run a line of bash; what it said is shown only where it fails."""
    done = subprocess.run(  # noqa: S603 - lines of this file
        ["/bin/bash", "-c", command],
        cwd=cwd,
        env=surroundings(**variables),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


if __name__ == "__main__":
    typer.run(main)
