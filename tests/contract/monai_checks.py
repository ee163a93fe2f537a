"""MONAI's checks of one bundle, run as a program: importing MONAI is slow, and bundles must not meet in a process.

    python monai_checks.py BUNDLE SCHEMA COHORT WORK

Writes WORK/result.json: of each check its name and the error, or null.
"""

from __future__ import annotations

import json
import shutil
import sys
import traceback
from pathlib import Path

from monai.bundle import ConfigParser, ConfigWorkflow, verify_metadata, verify_net_in_out

from common.weights import load_weights


def main(bundle: Path, schema: Path, cohort: Path, work: Path) -> None:
    """Run all checks; one that fails does not keep the others from running."""
    checks = {
        "metadata": lambda: check_metadata(bundle, schema, work),
        "smallest input": lambda: check_network(bundle, n=1, p=1, any=1),
        "any input": lambda: check_network(bundle, n=4, p=2, any=9),
        "inference": lambda: check_inference(bundle),
        "training": lambda: check_training(bundle, cohort, work / "runs"),
    }
    result = {}
    for name, check in checks.items():
        try:
            check()
            result[name] = None
        except (Exception, SystemExit):
            result[name] = traceback.format_exc()
    (work / "result.json").write_text(json.dumps(result), encoding="utf-8")


def check_metadata(bundle: Path, schema: Path, work: Path) -> None:
    """The metadata fit MONAI's schema. A schema that is there already is not downloaded."""
    shutil.copy(schema, work / "schema.json")
    verify_metadata(meta_file=str(bundle / "configs" / "metadata.json"), filepath=str(work / "schema.json"))


def check_network(bundle: Path, **size: int) -> None:
    """Channels and type of the output are those that the metadata state."""
    configs = bundle / "configs"
    verify_net_in_out(
        "network_def",
        meta_file=str(configs / "metadata.json"),
        config_file=str(configs / "inference.json"),
        device="cpu",
        **size,
    )


def check_inference(bundle: Path) -> None:
    """The items that MONAI's tools look for in an inference workflow are there."""
    workflow = make_workflow(bundle, ["inference.json"], "infer")
    missing = workflow.check_properties()
    assert not missing, missing


def check_training(bundle: Path, cohort: Path, runs: Path) -> None:
    """Each stage has the items of a training workflow and trains; the last one's weights fit the inference network."""
    overlays = [[path.name] for path in sorted((bundle / "configs").glob("train_*.json"))]
    for overlay in [*overlays, []]:
        stage = ["train.json", *overlay]
        workflow = make_workflow(
            bundle,
            stage,
            "train",
            cohort=str(cohort),
            output_dir=str(runs),
            max_epochs=1,
            epoch_length=2,
            batch_size=2,
            device="$torch.device('cpu')",
        )
        missing = workflow.check_properties()
        assert not missing, (stage, missing)
        workflow.run()
        workflow.finalize()
    parser = ConfigParser()
    parser.read_config(bundle / "configs" / "inference.json")
    network = parser.get_parsed_content("network_def")
    network.load_state_dict(load_weights(runs / "model.pt"))
    assert all(value.isfinite().all() for value in network.detector.state_dict().values() if value.is_floating_point())


def make_workflow(bundle: Path, configs: list[str], kind: str, **override: object) -> ConfigWorkflow:
    """An initialised workflow of configs of the bundle, merged in this order."""
    workflow = ConfigWorkflow(
        config_file=[str(bundle / "configs" / config) for config in configs],
        meta_file=str(bundle / "configs" / "metadata.json"),
        logging_file=False,
        workflow_type=kind,
        **override,
    )
    workflow.initialize()
    return workflow


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
