"""MONAI Label app: serves every bundle in its folder `model`, as `uad export` writes them.

MONAI Label's own app for bundles (`monaibundle`) serves them too, but it asks the model zoo at each start, offers
viewers the channels of the network as labels, and answers any image that it cannot use with `Internal Server Error`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import monailabel
from fastapi import HTTPException
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.exception import MONAILabelException
from monailabel.interfaces.tasks.strategy import Strategy
from monailabel.tasks.activelearning.first import First
from monailabel.tasks.infer.bundle import BundleInferTask


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
            raise HTTPException(422, f"{error.fact}; {error.remedy}") from error  # type: ignore[attr-defined]

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
            settings[name] = value
        if settings.get("save_map") and "int" in str(request.get("result_dtype")):
            raise HTTPException(422, "save_map gives decimals, integers were asked for; viewers show the mask only")
        return settings


class App(MONAILabelApp):
    """All bundles of the folder `model`; images one by one, in their order."""

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        self.bundles = sorted(path.parents[1] for path in Path(app_dir).glob("model/*/configs/metadata.json"))
        super().__init__(app_dir, studies, conf, "Unsupervised anomaly detection", version=monailabel.__version__)

    def init_infers(self) -> dict[str, AnomalyDetection]:
        """The models by the names of their folders."""
        return {path.name: AnomalyDetection(path, self.conf) for path in self.bundles}

    def init_strategies(self) -> dict[str, Strategy]:
        """Which image comes next."""
        return {"first": First()}

    def infer(self, request: dict[str, Any], datastore: Any = None) -> dict[str, Any]:
        """Raises HTTPException, whose text viewers show, for a model or an image that is not there."""
        try:
            return super().infer(request, datastore)
        except MONAILabelException as error:
            raise HTTPException(404, error.msg) from error
