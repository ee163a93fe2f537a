"""The evaluator loads its weights once, gives cases to its task, and errors stay what they are."""

from __future__ import annotations

import sys

import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader, Dataset
from monai.inferers import SimpleInferer
from torch import nn

from common.errors import BundleError, ImageShapeError
from common.weights import save_weights
from common.workflows.engines import DetectionEvaluator, cases, one_line_errors, run_or_exit


class Brighter(nn.Module):
    """What is added to an image is its only weight."""

    def __init__(self):
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(()))
        self.slice_scores = None

    def forward(self, image):
        return image + self.offset


class Task:
    """Takes notes; fails at a case on demand."""

    def __init__(self, error=None):
        self.seen, self.is_training, self.error = [], [], error

    def attach(self, evaluator):
        evaluator.add_event_handler(Events.ITERATION_COMPLETED, self.take)

    def take(self, engine):
        if self.error:
            raise self.error
        self.is_training.append(engine.network.training)
        self.seen += [(item["image"].item(), output["pred"].item()) for item, output in cases(engine)]


@pytest.fixture
def make(tmp_path):
    """An evaluator of two cases, 1 and 2, whose weights add 10."""
    save_weights({"offset": torch.tensor(10.0)}, tmp_path / "model.pt")
    data = [{"image": torch.tensor([value])} for value in (1.0, 2.0)]

    def evaluator(task, weights="model.pt"):
        return DetectionEvaluator(
            bundle="toy",
            device=torch.device("cpu"),
            val_data_loader=DataLoader(Dataset(data), batch_size=1, num_workers=0),
            network=Brighter(),
            weights=str(tmp_path / weights),
            preprocessing=None,
            task=task,
            inferer=SimpleInferer(),
        )

    return evaluator


def test_cases_come_with_their_output_by_the_loaded_weights(make):
    task = Task()
    evaluator = make(task)
    evaluator.run()
    assert task.seen == [(1, 11), (2, 12)]
    assert task.is_training == [False, False]


def test_weights_are_loaded_once(make):
    """So that what a task sets in the network stays for its second run."""
    task = Task()
    evaluator = make(task)
    evaluator.run()
    nn.init.constant_(evaluator.network.offset, 20.0)
    evaluator.run()
    assert task.seen[2:] == [(1, 21), (2, 22)]


@pytest.mark.parametrize(
    ("task", "weights", "kind"),
    [
        (Task(ImageShapeError("scan.nii.gz", "flat", "give a volume")), "model.pt", ImageShapeError),
        (Task(), "none.pt", BundleError),
    ],
)
def test_typed_errors_come_out_as_they_are(task, weights, kind, make):
    with pytest.raises(kind):
        make(task, weights).run()
    with pytest.raises(SystemExit) as ended:
        run_or_exit(make(task, weights))
    assert str(ended.value).startswith(f"{kind.__name__}: ")
    assert "\n" not in str(ended.value)


def test_other_errors_keep_their_traceback(make):
    with pytest.raises(ZeroDivisionError):
        run_or_exit(make(Task(ZeroDivisionError())))


def wrapped(error):
    """As MONAI hands an error on that was raised where an object of a config is made."""
    outer = RuntimeError("Failed to instantiate")
    outer.__cause__ = error
    return outer


def test_errors_of_configs_are_one_line(monkeypatch, capsys):
    others = []
    monkeypatch.setattr(sys, "excepthook", lambda *given: others.append(given[1]))
    one_line_errors()
    hook = sys.excepthook
    one_line_errors()
    assert sys.excepthook is hook  # not around itself
    hook(RuntimeError, wrapped(BundleError("model.pt", "no weights", "fetch them")), None)
    assert capsys.readouterr().err == "BundleError: model.pt: no weights; fetch them\n"
    unknown = wrapped(KeyError("x"))
    hook(RuntimeError, unknown, None)
    assert others == [unknown]
