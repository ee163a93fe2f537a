"""MONAI Label app: serves every bundle in its folder `model`, as `uad export` writes them.

MONAI Label's own app for bundles (`monaibundle`) serves them too, but it asks the model zoo at each start, offers
viewers the channels of the network as labels, and answers any image that it cannot use with `Internal Server Error`.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import monailabel
from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse
from monailabel.app import app as server
from monailabel.datastore.dicom import DICOMWebDatastore
from monailabel.endpoints import batch_infer, infer, scoring, train, wsi_infer
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.exception import MONAILabelException
from monailabel.interfaces.tasks.strategy import Strategy
from monailabel.tasks.activelearning.first import First
from monailabel.tasks.infer.bundle import BundleInferTask

WORDS: dict[str, str] = {}  # for settings that a bundle's errors may advise: this server has none of them
# what MONAI Label and its viewers put into a request beside the settings that a model shows
OF_VIEWERS = {"client_id", "label_info", "label_tag", "logging", "save_label", "timeout"}
OF_VIEWERS |= {f"result_{name}" for name in ("compress", "dtype", "extension")}
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
CHOICES = {  # MONAI Label fails at other values with a bare 500, at some of them after the calculation
    "logging": (*LEVELS, *(level.lower() for level in LEVELS)),
    "result_dtype": ("uint8", "int16", "uint16", "int32", "float32"),
    "result_extension": (".nii.gz", ".nii", ".nrrd", ".seg.nrrd", ".mha"),
}
OF_BATCHES = {"gpus", "images", "max_batch_size", "max_workers", "multi_gpu"}


class AnomalyDetection(BundleInferTask):
    """An exported bundle: mask (or map) as the image of the answer, the scores as its JSON.

    Args:
        path: the folder of the bundle.
        conf: of the server's command line.
    """

    def __init__(self, path: Path, conf: dict[str, str]) -> None:
        super().__init__(str(path), conf, load_strict=True)
        metadata = json.loads((path / "configs" / "metadata.json").read_text(encoding="utf-8"))
        shown = metadata["network_data_format"]["post_processed_outputs"]["pred"]["channel_def"]
        self.labels = {name: int(value) for value, name in shown.items() if name != "background"}

    def __call__(self, request: dict[str, Any], callbacks: Any = None) -> tuple[str | None, dict[str, Any]]:
        """Raises HTTPException where the image or a setting cannot be used."""
        if not request["image"]:  # of a name that is not in the folder of images; as a path it would be that of work
            raise HTTPException(404, "no such image on the server; GET /datastore/?output=all names those there are")
        try:
            return super().__call__(request | self._settings(request), callbacks)
        except Exception as error:
            if type(error).__module__ != "scripts._common.errors":  # the bundle's, which is imported anew each time
                raise
            remedy = error.remedy_in(WORDS)  # type: ignore[attr-defined]
            raise HTTPException(422, f"{error.fact}; {remedy}") from error  # type: ignore[attr-defined]

    def _settings(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the bundle, checked; OHIF sends as text what was typed. Raises HTTPException."""
        settings = {}
        for name in self.displayable_configs.keys() & request.keys():
            default, value = self.displayable_configs[name], request[name]
            try:
                value = json.loads(value) if isinstance(value, str) else value
                number = isinstance(value, (int, float)) and not isinstance(value, bool)
            except ValueError:
                number = False
            if not (isinstance(value, bool) if isinstance(default, bool) else number):
                raise HTTPException(422, f"{name} is {request[name]!r}; give a value like {json.dumps(default)}")
            if not isinstance(value, bool) and not 0 <= value < math.inf:  # NaN neither
                raise HTTPException(422, f"{name} is {value}; give a number from 0 on, such as {json.dumps(default)}")
            settings[name] = value
        if settings.get("save_map") and "int" in str(request.get("result_dtype")):
            raise HTTPException(422, "save_map gives decimals, integers were asked for; viewers show the mask only")
        return settings


class App(MONAILabelApp):
    """All bundles of the folder `model`; images one by one, in their order."""

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        self.bundles = sorted(path.parents[1] for path in Path(app_dir).glob("model/*/configs/metadata.json"))
        super().__init__(app_dir, studies, conf, "Unsupervised anomaly detection", version=monailabel.__version__)
        self.check_requests()

    def check_requests(self) -> None:
        """Put checks before what answers requests, where MONAI Label answers with a bare 500, later, or not at all."""
        infer.run_inference = before(infer.run_inference, self.check_infer)
        batch_infer.run = before(batch_infer.run, self.check_batch)
        train.run = train.run_model = refuse_training
        scoring.run_method = refuse_scoring
        wsi_infer.run_wsi_inference = refuse_slides
        server.add_exception_handler(MONAILabelException, answer_not_found)
        server.middleware_stack = server.build_middleware_stack()  # the server has built it before it loads this app

    def check_infer(
        self, model: str, image: str, session_id: str, params: str, file: Any, output: Any, **_: Any
    ) -> None:
        """Raises HTTPException where a request for the anomalies of one image cannot be answered."""
        if not (file or image or session_id):
            raise HTTPException(422, "no image; name one of the server with image=, or send a file along")
        if output == "dicom_seg" and not isinstance(self.datastore(), DICOMWebDatastore):
            raise HTTPException(422, "no DICOM from a folder of images; ask for the output image, json or all")
        try:
            given = json.loads(params or "{}", parse_constant=no_json)
        except ValueError as error:
            raise HTTPException(422, f'params is not JSON ({error}); write it like {{"threshold": 0.1}}') from error
        self.check_params(model, given, OF_VIEWERS)

    def check_batch(self, model: str, params: Any, **_: Any) -> None:
        """Raises HTTPException where a request for all images would fail at each of them."""
        if model not in self._infers:
            raise HTTPException(404, f"no model {model!r}; there are {', '.join(sorted(self._infers))}")
        self.check_params(model, params or {}, OF_VIEWERS | OF_BATCHES)

    def check_params(self, model: str, given: Any, others: Iterable[str]) -> None:
        """Raises HTTPException for a parameter that nothing would look at, and for a choice that there is not."""
        if not isinstance(given, dict):
            raise HTTPException(422, 'params is no object; write it like {"threshold": 0.1}')
        if model not in self._infers:
            return  # which is said later
        shown = self._infers[model].config()
        for name in given.keys() - shown.keys() - set(others):
            near = get_close_matches(name, shown, n=1) or sorted(self._infers[model].displayable_configs)
            raise HTTPException(422, f"no parameter is called {name!r}; did you mean {' or '.join(near)}?")
        chosen, files = given.get("model_filename"), shown["model_filename"]
        if chosen is not None and chosen != files and chosen not in files:
            raise HTTPException(422, f"no weights {chosen!r} in {model}; there are {', '.join(files)}")
        cards = [f"cuda:{index}" for index in range(len(shown["device"]))]
        devices = tuple(dict.fromkeys([*shown["device"], "cpu", "cuda", *cards]))
        for name, choices in (CHOICES | {"device": devices}).items():
            if given.get(name) not in (None, *choices):
                raise HTTPException(422, f"{name} is {given[name]!r}; choose one of {', '.join(choices)}")

    def init_infers(self) -> dict[str, AnomalyDetection]:
        """The models by the names of their folders."""
        return {path.name: AnomalyDetection(path, self.conf) for path in self.bundles}

    def init_strategies(self) -> dict[str, Strategy]:
        """Which image comes next."""
        return {"first": First()}


def before(answer: Callable[..., Any], check: Callable[..., None]) -> Callable[..., Any]:
    """The function that answers requests, after a check of its arguments."""
    answer = inspect.unwrap(answer)  # where the app is loaded again

    @functools.wraps(answer)
    def checked(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(answer).bind(*args, **kwargs)
        given.apply_defaults()
        check(**given.arguments)
        return answer(*args, **kwargs)

    return checked


def no_json(constant: str) -> NoReturn:
    """NaN and the infinities, which Python reads and JSON has not."""
    raise ValueError(f"{constant} is no number of JSON")


def refuse_training(model: str = "", *_: Any, **__: Any) -> NoReturn:
    """Raises HTTPException."""
    raise HTTPException(404, f"no trainer for {model or 'any bundle'} on this server; `uad train` trains, on a cohort")


def refuse_scoring(method: str, *_: Any, **__: Any) -> NoReturn:
    """Raises HTTPException."""
    raise HTTPException(404, f"no scoring method {method!r} on this server; scores come with the answer to /infer")


def refuse_slides(*_: Any, **__: Any) -> NoReturn:
    """Raises HTTPException."""
    raise HTTPException(404, "no slides of pathology on this server; POST /infer/ and the name of a bundle takes scans")


def answer_not_found(_: Request, error: MONAILabelException) -> JSONResponse:
    """Where an image, label, model or strategy is not there, which MONAI Label itself answers with a bare 500."""
    return JSONResponse({"detail": " ".join(error.msg.split())}, status_code=404)
