"""The anomaly map of the sample by every way that a bundle is run, beside `monai.bundle run` in this repository.

    python apps/compare.py mad_ad berdiff --alone build/alone --label label/environment --deploy ~/deploy

Printed: a row a bundle, with the largest difference of the map by the exported zip, MONAI Label and MONAI Deploy; 0 is
the same bits. The options are folders of environments: that of `--alone` is made, with the exported bundles' own
`requirements.txt` and nothing else, where it is missing; the other two are those of the READMEs beside this file. MONAI
Deploy reads the sample as a DICOM series, and so does the run that it is compared with.
"""

from __future__ import annotations

import os
import runpy
import shlex
import socket
import subprocess
import sys
import time
import venv
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated
from urllib.request import urlopen

import nibabel as nib
import numpy as np
import typer

from common.bundle import BUNDLES_DIR, metadata
from common.cohorts.table import sample_dir
from common.errors import UADError

HERE = Path(__file__).parent
ROOT = HERE.parent
IMAGE = Path(sample_dir()) / "mni152_lesions_T1.nii.gz"
NAME = IMAGE.name.removesuffix(".nii.gz")
STARTED_WITHIN_S = 600
decode = runpy.run_path(str(HERE / "monai_deploy" / "test_app.py"))["decode"]  # DICOM to an image in RAS


def main(
    keys: Annotated[list[str], typer.Argument(help="Bundles for brain T1.")],
    alone: Annotated[Path, typer.Option(help="Environment of the exported bundles.")],
    label: Annotated[Path, typer.Option(help="Environment of MONAI Label.")],
    deploy: Annotated[Path, typer.Option(help="Environment of MONAI Deploy.")],
) -> None:
    """Print the table."""
    try:
        for key in keys:
            metadata(key)
    except UADError as error:
        raise typer.BadParameter(str(error)) from None
    alone, label, deploy = (path.expanduser().resolve() for path in (alone, label, deploy))
    with TemporaryDirectory() as folder:
        work = Path(folder)
        call(f"{python()} {HERE}/monai_deploy/make_dicom.py {work}/series")
        call(f"{HERE}/monai_label/prepare.sh {work}/app {shlex.join(keys)}", PATH=path_of(sys.prefix))
        (work / "studies").mkdir()
        (work / "studies" / IMAGE.name).symlink_to(IMAGE)
        print("| bundle | highest value | exported zip | MONAI Label | MONAI Deploy |\n|---|---|---|---|---|")
        with server(work, label) as address:
            for key in keys:
                print(row(key, work, alone, address, deploy), flush=True)


def row(key: str, work: Path, alone: Path, address: str, deploy: Path) -> str:
    """A line of the table."""
    here = run_here(key, IMAGE, work / key / "here")
    differences = (
        difference(here, run_alone(key, work / key, alone)),
        difference(here, run_label(key, work / key, address)),
        difference(run_here(key, work / "series", work / key / "series"), run_deploy(key, work, deploy)),
    )
    return f"| {key} | {np.asanyarray(here.dataobj).max():.4g} | " + " | ".join(f"{d:.2g}" for d in differences) + " |"


def run_here(key: str, image: Path, output: Path) -> nib.Nifti1Image:
    """`monai.bundle run` in this repository."""
    config = BUNDLES_DIR / key / "configs" / "inference.json"
    call(f"{python()} -m monai.bundle run --config_file {config} --image {image} --output_dir {output}")
    return nib.load(next(output.rglob("anomaly_map.nii.gz")))


def run_alone(key: str, work: Path, environment: Path) -> nib.Nifti1Image:
    """The archive, unpacked, from another folder, without this repository on any path."""
    call(f"{path_of(sys.prefix)}/uad export {key} -o {work}/exported")
    with zipfile.ZipFile(work / "exported" / f"{key}.zip") as archive:
        archive.extractall(work / "alone")
    if not environment.exists():
        venv.create(environment, with_pip=True)
        call(f"{python(environment)} -m pip install -r {work}/alone/{key}/requirements.txt")
    config = f"{work}/alone/{key}/configs/inference.json"
    command = f"{python(environment)} -m monai.bundle run --config_file {config} --output_dir {work}/alone/out"
    call(command, cwd=work, PYTHONPATH="")
    return nib.load(work / "alone" / "out" / NAME / "anomaly_map.nii.gz")


def run_label(key: str, work: Path, address: str) -> nib.Nifti1Image:
    """The float map of the server."""
    url = shlex.quote(f"{address}/infer/{key}?image={NAME}&output=image")
    call(f"curl -sf -X POST {url} -F 'params={{\"save_map\": true}}' -o {work}/label.nii.gz")
    return nib.load(work / "label.nii.gz")


def run_deploy(key: str, work: Path, environment: Path) -> nib.Nifti1Image:
    """The DICOM Parametric Map of the application."""
    libraries = next(environment.glob("lib/python*/site-packages/nvidia/cu13")) / "lib"
    output = work / key / "deploy"
    command = f"{python(environment)} {HERE}/monai_deploy/app -i {work}/series -m {BUNDLES_DIR / key} -o {output}"
    call(f"ulimit -s 32768 && {command}", LD_LIBRARY_PATH=str(libraries))
    return decode(output / "anomaly_map.dcm")


@contextmanager
def server(work: Path, environment: Path) -> Iterator[str]:
    """MONAI Label with the app in `work`; its address."""
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
        yield address
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


def difference(one: nib.Nifti1Image, other: nib.Nifti1Image) -> float:
    """The largest, over the voxels; raises ValueError where the grids differ."""
    one, other = nib.as_closest_canonical(one), nib.as_closest_canonical(other)
    if one.shape != other.shape or not np.allclose(one.affine, other.affine, atol=1e-4):
        raise ValueError(f"grids differ: {one.shape} {other.shape}\n{one.affine}\n{other.affine}")
    return float(np.abs(np.asanyarray(one.dataobj) - np.asanyarray(other.dataobj)).max())


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
