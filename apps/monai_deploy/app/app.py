"""DICOM in, DICOM Segmentation, Parametric Map and a summary out: a bundle as an application of MONAI Deploy."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from monai.deploy.conditions import CountCondition
from monai.deploy.core import Application
from monai.deploy.operators import DICOMDataLoaderOperator
from operators import AnomalyBundleOperator, ResultWriterOperator, SeriesSelectorOperator, SeriesToVolumeOperator
from settings import Settings, check_command_line

from common.errors import BundleError, SettingError
from common.images.dicom import find_series


class AnomalyApp(Application):
    """Load studies, select the series that the bundle wants, read it, detect, write.

    Paths come from the command line (-i, -o, -m) or from HOLOSCAN_INPUT_PATH, HOLOSCAN_OUTPUT_PATH and
    HOLOSCAN_MODEL_PATH, as in a MONAI Application Package. Raises UADError where an input is to blame.
    """

    def __init__(self) -> None:
        super().__init__()
        arguments, deidentify = check_command_line(self.argv)
        self.app_context = Application.init_app_context(arguments)
        # else the operator takes the SDK's stand-in for the model of a folder for a network
        self.app_context.models = None
        self.input_folder, self.output_folder = (
            Path(path).resolve() for path in (self.app_context.input_path, self.app_context.output_path)
        )
        self.bundle = find_bundle(Path(self.app_context.model_path).resolve())
        self.metadata = metadata_of(self.bundle)
        find_series(self.input_folder)  # refuses damaged files, on which the SDK's loader ends without saying so
        self.settings = Settings.read()
        if deidentify:
            self.settings = dataclasses.replace(self.settings, deidentify=True)

    def compose(self) -> None:
        """Connect the operators."""
        rules_file = self.settings.rules_file()
        rules = rules_of(rules_file, self.metadata)
        once = CountCondition(self, 1)
        load = DICOMDataLoaderOperator(self, once, input_folder=self.input_folder, name="load")
        select = SeriesSelectorOperator(self, rules=rules, rules_file=rules_file, all_matched=True, name="select")
        read = SeriesToVolumeOperator(self, folder=self.input_folder, rules_file=rules_file, name="read")
        detect = AnomalyBundleOperator(
            self, app_context=self.app_context, bundle_path=self.bundle, strip=self.settings.strip, name="detect"
        )
        write = ResultWriterOperator(
            self,
            folder=self.output_folder,
            bundle=self.bundle,
            metadata=self.metadata,
            deidentify=self.settings.deidentify,
            name="write",
        )
        self.add_flow(load, select, {("dicom_study_list", "dicom_study_list")})
        self.add_flow(select, read, {("study_selected_series_list", "study_selected_series_list")})
        self.add_flow(read, detect, {("image", "image")})
        self.add_flow(detect, write, {("pred", "detection")})


def find_bundle(folder: Path) -> Path:
    """A bundle's folder: this one, or the only one in it, where a MONAI Application Package has it.

    Raises BundleError.
    """
    candidates = [folder, *(sorted(folder.iterdir()) if folder.is_dir() else ())]
    bundles = [path for path in candidates if (path / "configs" / "metadata.json").is_file()]
    if len(bundles) != 1:
        raise BundleError(folder, f"{len(bundles)} bundles in it", "give the folder of one bundle with -m")
    return bundles[0]


def metadata_of(bundle: Path) -> dict[str, Any]:
    """What a bundle says of itself. Raises BundleError for a damaged file, and for bundles of other projects."""
    path = bundle / "configs" / "metadata.json"
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
        missing = [key for key in ("name", "version", "title", "modalities") if key not in metadata]
    except (OSError, ValueError, TypeError) as error:
        raise BundleError(path, f"no metadata ({type(error).__name__}: {error})", "take the bundle anew") from error
    if missing:
        raise BundleError(path, f"says nothing of its {', '.join(missing)}", "give the folder of one of our bundles")
    return metadata


def rules_of(path: Path, metadata: dict[str, Any]) -> str:
    """The selection of a bundle's modality, of the rules in a file, as the SDK's selector takes it.

    Raises BundleError where there is none, and for bundles of several modalities; SettingError for a damaged file.
    """
    name, modalities = metadata["name"], metadata["modalities"]
    if len(modalities) > 1:
        fact = f"works on {', '.join(modalities)} together, this application on one series"
        raise BundleError(name, fact, "choose a bundle of one modality")
    try:
        selections = json.loads(path.read_text(encoding="utf-8"))["selections"]
        chosen = [selection for selection in selections if [selection["name"]] == modalities]
    except (ValueError, KeyError, TypeError) as error:
        fact = f"no rules of series ({type(error).__name__}: {error})"
        raise SettingError(path, fact, "write it like series_rules.json of the application") from error
    if len(chosen) != 1:
        fact = f"{len(chosen)} selections in {path.name} are named {modalities[0]}"
        raise BundleError(name, fact, f"write one of that name into {path}")
    return json.dumps({"selections": chosen})
