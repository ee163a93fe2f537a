"""A server with the bundles of test.sh, which starts it, beside their own `monai.bundle run`.

The client is MONAI Label's own; its module for 3D Slicer contains the same.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import requests
import SimpleITK as sitk  # noqa: N813 - everyone's name for it

if "LABEL_SERVER" not in os.environ:
    pytest.skip("test.sh starts the server", allow_module_level=True)

from monailabel.client import MONAILabelClient
from monailabel.client.client import MONAILabelClientException

SERVER, WORK, SAMPLE = os.environ["LABEL_SERVER"], Path(os.environ["LABEL_WORK"]), Path(os.environ["LABEL_SAMPLE"])
NAME = "mni152_lesions_T1"
IMAGE = SAMPLE / f"{NAME}.nii.gz"
BUNDLES = ["dae", "mad_ad"]
VIEWER = {"result_extension": ".nrrd", "result_dtype": "uint8"}  # what the modules for 3D Slicer and OHIF add
README = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def infos():
    return MONAILabelClient(SERVER).info()


def infer(model, image_id=NAME, file=None, session=None, **params):
    """The image of the answer, and its JSON."""
    client = MONAILabelClient(SERVER, tmpdir=str(WORK))
    path, scores = client.infer(model, image_id, params, file=file and str(file), session_id=session)
    image = sitk.ReadImage(path)
    Path(path).unlink()
    return image, scores


def expected(model, name="anomaly_map"):
    return sitk.ReadImage(str(WORK / "expected" / model / NAME / f"{name}.nii.gz"))


def record(model):
    return json.loads((WORK / "expected" / model / NAME / "run.json").read_text(encoding="utf-8"))


def values(image):
    return sitk.GetArrayFromImage(image)


def assert_same_grid(image, other):
    assert image.GetSize() == other.GetSize()
    for part in ("GetOrigin", "GetSpacing", "GetDirection"):
        np.testing.assert_allclose(getattr(image, part)(), getattr(other, part)(), atol=1e-5)


def commands(word):
    """The lines of the README's code that hold a word, for this server and its folder."""
    lines = [line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
    return [line.replace("http://127.0.0.1:8000", SERVER) for line in lines if line.startswith("curl") and word in line]


def run(command, folder):
    done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout


def test_info_shows_the_bundles_and_their_settings(infos):
    assert {*BUNDLES, "negated"} == set(infos["models"])
    assert infos["labels"] == ["anomaly"]
    for key in BUNDLES:
        about = infos["models"][key]
        assert (about["type"], about["dimension"], about["labels"]) == ("segmentation", 3, {"anomaly": 1})
        shown = {name: about["config"][name] for name in ("threshold", "min_volume_ml", "save_map")}
        assert shown == {"threshold": record(key)["threshold"], "min_volume_ml": 0.02, "save_map": False}


@pytest.mark.parametrize("model", BUNDLES)
def test_map_is_that_of_the_bundle(model):
    image, _ = infer(model, save_map=True)
    assert values(image).dtype == np.float32
    assert values(image).max() > 0
    assert_same_grid(image, expected(model))
    assert np.array_equal(values(image), values(expected(model)))  # not a bit of difference


@pytest.mark.parametrize("model", BUNDLES)
def test_viewer_gets_the_mask_and_the_score(model, infos):
    """As the module for 3D Slicer asks: with all settings that it was shown."""
    config = {
        name: value[0] if isinstance(value, list) else value for name, value in infos["models"][model]["config"].items()
    }
    image, scores = infer(model, **config, **VIEWER)
    assert values(image).dtype == np.uint8
    assert_same_grid(image, expected(model))
    assert 0 < values(image).sum() < 0.2 * values(image).size
    assert np.array_equal(values(image), values(expected(model, "segmentation")))
    assert scores["label_names"] == {"anomaly": 1}
    for name in ("threshold", "volume_score", "volume_score_percentile", "abnormal_share"):
        assert scores[name] == pytest.approx(record(model)[name], rel=1e-6), name


@pytest.mark.parametrize("as_text", [False, True])
def test_threshold_of_a_viewer(as_text):
    """OHIF sends text. Without small components removed, the mask is what the map says."""
    anomaly_map, sums = values(expected("dae")), []
    for threshold in (1.5, 2.5, 5.0):
        settings = {"threshold": str(threshold) if as_text else threshold, "min_volume_ml": 0.0}
        image, scores = infer("dae", **settings, **VIEWER)
        assert np.array_equal(values(image), anomaly_map > threshold)
        assert scores["threshold"] == threshold
        sums.append(int(values(image).sum()))
    assert sums[0] > sums[1] > sums[2] > 0
    image, _ = infer("dae", **VIEWER)  # the next viewer is not asked the same
    assert np.array_equal(values(image), values(expected("dae", "segmentation")))


def test_image_of_a_viewer():
    """Sent along, or before in a session, which is what 3D Slicer does with a scan that the server has not."""
    image, _ = infer("dae", image_id="", file=IMAGE, save_map=True)
    assert np.array_equal(values(image), values(expected("dae")))
    session = MONAILabelClient(SERVER).create_session(str(IMAGE))["session_id"]
    image, _ = infer("dae", image_id="not here", session=session, **VIEWER)
    assert np.array_equal(values(image), values(expected("dae", "segmentation")))


@pytest.mark.parametrize("suffix", [".nrrd", ".nii.gz"])
def test_oblique_image(suffix, tmp_path):
    """Axes in another order, flipped and turned: the answer lies on the grid of the image."""
    scan = sitk.PermuteAxes(sitk.Flip(sitk.ReadImage(str(IMAGE)), [True, False, False]), [2, 0, 1])
    turn = sitk.Euler3DTransform()
    turn.SetRotation(0.2, -0.1, 0.3)
    matrix = np.reshape(turn.GetMatrix(), (3, 3)) @ np.reshape(scan.GetDirection(), (3, 3))
    scan.SetDirection(matrix.ravel())
    sitk.WriteImage(scan, str(tmp_path / f"scan{suffix}"))
    image, _ = infer("dae", image_id="", file=tmp_path / f"scan{suffix}", save_map=True, result_extension=suffix)
    assert_same_grid(image, scan)
    brain = values(scan) > 0
    assert values(image)[brain].any()
    assert not values(image)[~brain].any()


def test_bundles_do_not_mix():
    """`negated` holds modules of the same names as `dae`, in one of which the score has another sign."""
    for model in ("dae", "negated", "mad_ad", "negated", "dae"):
        image, scores = infer(model, save_map=True)
        sign, own = (-1, "dae") if model == "negated" else (1, model)
        assert np.array_equal(values(image), values(expected(own)))
        assert scores["volume_score"] == pytest.approx(sign * record(own)["volume_score"], rel=1e-6)


@pytest.fixture(params=["text", "head", "nan", "flat"])
def bad_upload(request, tmp_path):
    """A file that is no brain, and what the answer has to say of it."""
    path, scan = tmp_path / "bad.nii.gz", sitk.ReadImage(str(IMAGE))
    array = values(scan).astype(np.float32)
    if request.param == "text":
        path.write_text("not an image")
        return path, "not compressed"
    if request.param == "head":
        shutil.copy(SAMPLE / "head_lesions_T1.nii.gz", path)
        return path, "skull-strip"
    array[40, 40, 40] = np.nan if request.param == "nan" else 0
    bad = sitk.GetImageFromArray(array if request.param == "nan" else array[:1])
    sitk.WriteImage(bad, str(path))
    return path, "NaN" if request.param == "nan" else "single slice"


def refused(status, text, *args, **kwargs):
    with pytest.raises(MONAILabelClientException) as error:
        infer(*args, **kwargs)
    assert f"Status: {status}" in error.value.msg
    assert text in error.value.msg
    assert " --" not in error.value.msg  # options are for those who have a command line


def test_bad_upload_is_refused_and_the_server_lives(bad_upload):
    path, text = bad_upload
    refused(422, text, "dae", image_id="", file=path, **VIEWER)
    image, _ = infer("dae", **VIEWER)
    assert np.array_equal(values(image), values(expected("dae", "segmentation")))


def test_bad_request_is_refused():
    refused(404, "no such image", "dae", image_id="sub-99")
    refused(404, "no model 'berdiff'", "berdiff")
    for threshold in ("high", "", None, True, [0.1], -1, "-0.1"):
        refused(422, "threshold is", "dae", threshold=threshold)
    refused(422, "min_volume_ml is -1", "dae", min_volume_ml=-1)
    refused(422, "no parameter is called 'treshold'; did you mean threshold?", "dae", treshold=0.1)
    refused(422, "no weights 'other.pt' in dae; there are model.pt", "dae", model_filename="other.pt")
    refused(422, "save_map", "dae", save_map="perhaps")
    refused(422, "integers", "dae", save_map=True, **VIEWER)


@pytest.mark.parametrize(
    ("path", "params", "status", "text"),
    [
        (f"infer/dae?image={NAME}", "{bad", 422, "params is not JSON"),
        (f"infer/dae?image={NAME}", '{"threshold": NaN}', 422, "NaN"),
        (f"infer/dae?image={NAME}", '{"threshold": 1e999}', 422, "threshold is inf"),
        (f"infer/dae?image={NAME}", '{"device": "quantum"}', 422, "device is 'quantum'; choose one of cpu"),
        (f"infer/dae?image={NAME}", '{"logging": "loud"}', 422, "logging is 'loud'"),
        (f"infer/dae?image={NAME}", '{"result_dtype": "uint99"}', 422, "result_dtype is 'uint99'"),
        (f"infer/dae?image={NAME}", '{"result_extension": ".doc"}', 422, "result_extension is '.doc'; choose one"),
        (f"infer/dae?image={NAME}", "[0.1]", 422, "params is no object"),
        (f"infer/dae?image={NAME}&output=dicom_seg", "{}", 422, "no DICOM from a folder of images"),
        (f"infer/dae?image={NAME}&output=nothing", "{}", 422, "output"),
        ("infer/dae", "{}", 422, "no image"),
        ("train/dae", None, 404, "no trainer for dae"),
        ("train/", None, 404, "no trainer for any bundle"),
        ("scoring/dice", None, 404, "no scoring method 'dice'"),
        ("activelearning/random", None, 404, "no such strategy 'random'"),
        ("batch/infer/berdiff", None, 404, "no model 'berdiff'; there are dae, mad_ad"),
        (f"infer/wsi_v2/dae?image={NAME}", None, 404, "no slides"),
    ],
)
def test_request_without_an_answer_is_told_why(path, params, status, text):
    """One line, with a status that says that the request is to blame."""
    form = None if params is None else {"params": params}
    answer = requests.post(f"{SERVER}/{path}", data=form, json={} if form is None else None, timeout=60)
    assert (answer.status_code, text in answer.text) == (status, True), answer.text
    assert "Traceback" not in answer.text and "\\n" not in answer.text


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("DELETE", "datastore/image?id=sub-99"),
        ("PUT", "datastore/image/info?image=sub-99"),
        ("PUT", "datastore/label/info?label=sub-99&tag=final"),
    ],
)
def test_what_the_server_has_not_is_said_on_every_route(method, path):
    answer = requests.request(method, f"{SERVER}/{path}", data={"info": "{}"}, timeout=60)
    assert (answer.status_code, "sub-99" in answer.json()["detail"]) == (404, True), answer.text


def test_batch_of_a_misspelt_setting_is_refused():
    answer = requests.post(f"{SERVER}/batch/infer/dae", json={"treshold": 0.1}, timeout=60)
    assert (answer.status_code, "'treshold'" in answer.text) == (422, True)


def test_many_clients_at_once():
    """12 requests of 4 clients, each with settings of its own."""
    choice = random.Random(0)  # noqa: S311
    models = ["mad_ad" if index % 5 == 3 else "dae" for index in range(12)]
    thresholds = [round(choice.uniform(0.5, 2) * record(model)["threshold"], 4) for model in models]

    def ask(model, threshold):
        image, scores = infer(model, threshold=threshold, min_volume_ml=0.0, **VIEWER)
        return np.array_equal(values(image), values(expected(model)) > threshold) and scores["threshold"] == threshold

    with ThreadPoolExecutor(4) as clients:
        assert list(clients.map(ask, models, thresholds)) == [True] * 12


def test_commands_of_the_readme(tmp_path):
    shutil.copy(IMAGE, tmp_path / "scan.nii.gz")
    assert json.loads(run(*commands("/info/"), tmp_path))["models"]
    for command in commands(" -o "):
        run(command, tmp_path)
    anomaly_map, mask = values(expected("dae")), values(expected("dae", "segmentation"))
    for name in ("mask", "mask_of_upload"):
        assert np.array_equal(values(sitk.ReadImage(str(tmp_path / f"{name}.nii.gz"))), mask)
    assert np.array_equal(values(sitk.ReadImage(str(tmp_path / "map.nii.gz"))), anomaly_map)
    above = values(sitk.ReadImage(str(tmp_path / "mask_above.nii.gz")))
    assert 0 < above.sum() < mask.sum()
    assert not above[anomaly_map <= 5].any()
    scores = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert scores["volume_score"] == pytest.approx(record("dae")["volume_score"], rel=1e-6)


def test_batch(tmp_path):
    """The README's commands again; after it the server still answers."""
    start, status = commands("/batch/infer")
    run(start, tmp_path)
    deadline = time.monotonic() + 600
    while (task := json.loads(run(status, tmp_path)))["status"] in ("SUBMITTED", "RUNNING"):
        assert time.monotonic() < deadline, task
        time.sleep(2)
    assert task["status"] == "DONE", task
    label = sitk.ReadImage(str(WORK / "studies" / "labels" / "original" / f"{NAME}.nii.gz"))
    assert np.array_equal(values(label), values(expected("dae", "segmentation")))
    image, _ = infer("dae", **VIEWER)
    assert np.array_equal(values(image), values(expected("dae", "segmentation")))
