"""What the SDK's operators do not: keep the geometry and the float map, and say who made the results."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deidentify import deidentified
from monai.deploy.core import AppContext, Image, IOType, Operator, OperatorSpec
from monai.deploy.operators import DICOMSeriesSelectorOperator, MonaiBundleInferenceOperator
from monai.deploy.operators.monai_bundle_inference_operator import IOMapping
from summary import summarise

from common.errors import DicomError, OutputError, SettingError
from common.files import replacing
from common.images.check import typed_errors
from common.images.dicom import choose_series, find_series, read_series
from common.results.case import Case
from common.results.dicom import save_dicom
from common.weights import load_weights, sha256
from common.workflows.inference import source_series


@dataclass(frozen=True)
class Detected:
    """What was found in a volume, with what the numbers are to be compared with."""

    case: Case
    result: dict[str, Any]
    brain_source: str


class SeriesSelectorOperator(DICOMSeriesSelectorOperator):
    """The SDK's selection of series; a rule of no use is told in one line, where the SDK ends with a traceback.

    Args:
        rules_file: what `rules` were read from.
    Raises SettingError.
    """

    def __init__(self, *args: Any, rules_file: Path, **kwargs: Any) -> None:
        self.rules_file = rules_file
        super().__init__(*args, **kwargs)

    def filter(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Select."""
        try:
            return super().filter(*args, **kwargs)
        except Exception as error:  # of a pattern, of a condition's type, of what the SDK does not compare
            fact = f"a rule cannot be used ({type(error).__name__}: {error})"
            raise SettingError(self.rules_file, fact, "write it like series_rules.json of the application") from error


class SeriesToVolumeOperator(Operator):
    """The one series that was selected: an Image (1, I, J, K) float32 with its affine (RAS, mm) in the metadata.

    In place of the SDK's operator of that kind, whose affine is wrong where pixels are not square (it takes the spacing
    of rows for that of columns), which leaves out slices without a position and does not see that slices are missing.

    Args:
        folder: what the series were loaded from.
        rules_file: what they were selected by.
    Raises DicomError where no series or several were selected, or it is not one whole volume.
    """

    def __init__(self, *args: Any, folder: Path, rules_file: Path, **kwargs: Any) -> None:
        self.folder = folder
        self.rules_file = rules_file
        super().__init__(*args, **kwargs)

    def setup(self, spec: OperatorSpec) -> None:
        """Name the ports."""
        spec.input("study_selected_series_list")
        spec.output("image")

    def compute(self, op_input: Any, op_output: Any, context: Any) -> None:
        """Read."""
        studies = op_input.receive("study_selected_series_list") or []
        uids = {str(chosen.series.SeriesInstanceUID) for study in studies for chosen in study.selected_series}
        if len(uids) != 1:
            found = [series for series in find_series(self.folder) if series.uid in uids or not uids]
            fact = f"{len(uids)} series match {self.rules_file.name}; there are: {', '.join(map(str, found))}"
            raise DicomError(self.folder, fact, "give a folder with one such series, or adapt the rules")
        image = read_series(choose_series(self.folder, uids.pop()))
        op_output.emit(Image(image.as_tensor().numpy(), dict(image.meta)), "image")


class AnomalyBundleOperator(MonaiBundleInferenceOperator):
    """The SDK's operator on a bundle's folder, but for what leaves it: all maps as they are, not one cast to uint8.

    Args:
        bundle_path: the bundle's folder.
        strip: what to do with a skull, see `BrainMaskd`.
    Raises UADError where the weights are damaged, or the image is not what the bundle works on.
    """

    def __init__(self, *args: Any, app_context: AppContext, bundle_path: Path, strip: str, **kwargs: Any) -> None:
        self.strip = None if strip == "none" else strip
        super().__init__(
            *args,
            app_context=app_context,
            bundle_path=bundle_path,
            input_mapping=[IOMapping("image", Image, IOType.IN_MEMORY)],
            output_mapping=[IOMapping("pred", Detected, IOType.IN_MEMORY)],
            **kwargs,
        )

    def _init_config(self, config_names: list[str]) -> None:
        load_weights(self.bundle_path / "models" / "model.pt")  # looks at the checksums, as the SDK does not
        super()._init_config(config_names)

    def _get_compose(self, obj_name: str, disallowed_prefixes: list[str]) -> Any:
        if obj_name == self._bundle_config_names.preproc_name:  # the first that is made
            self.parser["bundle_root"] = str(self.bundle_path)
            if self.parser["preprocessing"]["_target_"].endswith("BrainPreprocessing"):  # others work on heads
                self.parser["preprocessing::strip"] = self.strip
        return super()._get_compose(obj_name, disallowed_prefixes)

    def compute(self, op_input: Any, op_output: Any, context: Any) -> None:
        """Detect."""
        with typed_errors():
            super().compute(op_input, op_output, context)

    def predict(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        """The network takes the image alone, not all tensors of the item."""
        return super().predict(data)

    def post_process(self, data: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The whole item as the operator's one output."""
        return {"pred": super().post_process(data, *args, **kwargs)}

    def _send_output(self, value: dict[str, Any], name: str, metadata: Any, op_output: Any, context: Any) -> None:
        case = Case(
            subject="scan",
            image=value["input"],
            brain=value["brain"],
            anomaly_map=value["anomaly_map"],
            reconstruction=value["reconstruction"],
            segmentation=value["segmentation"],
        )
        detected = Detected(case, value["result"], value["brain_source"])
        op_output.emit(detected, name)


class ResultWriterOperator(Operator):
    """Write segmentation.dcm, anomaly_map.dcm and summary.txt into a folder.

    In place of the SDK's writer of segmentations, which says neither which weights were used nor writes float maps.

    Args:
        folder: made if it is not there.
        bundle: its folder.
        metadata: its metadata.
        deidentify: leave out what the series says of the patient.
    Raises DicomError where the series does not allow DICOM results, OutputError where the folder cannot be written.
    """

    def __init__(
        self, *args: Any, folder: Path, bundle: Path, metadata: dict[str, Any], deidentify: bool, **kwargs: Any
    ) -> None:
        self.folder = folder
        self.deidentify = deidentify
        self.weights = bundle / "models" / "model.pt"
        self.about = metadata
        super().__init__(*args, **kwargs)

    def setup(self, spec: OperatorSpec) -> None:
        """Name the port."""
        spec.input("detection")

    def compute(self, op_input: Any, op_output: Any, context: Any) -> None:
        """Write."""
        found: Detected = op_input.receive("detection")
        name, version, digest = self.about["name"], self.about["version"], sha256(self.weights)
        series = source_series(found.case.image)
        about = {
            "method": f"{self.about['title']}, {name} {version}; research software, not a medical device",
            "weights": f"sha256 {digest}",
            "series": f"{series.name} {series.uid}",
            "brain mask": found.brain_source,
        }
        try:
            with deidentified(series) if self.deidentify else nullcontext(series) as sources:
                save_dicom(found.case, sources, self.folder, name, version, found.result["threshold"], digest)
            with replacing(self.folder / "summary.txt") as path:
                path.write_text(summarise(about, found.case, found.result), encoding="utf-8")
        except OSError as error:
            fact = f"cannot be written ({error.strerror or error})"
            raise OutputError(self.folder, fact, "choose another output folder, or make room in it") from error
