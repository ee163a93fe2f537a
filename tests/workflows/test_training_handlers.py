"""A tiny DAE trained with MONAI's trainer: averaged, resumed after an interruption, written at the end."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SimpleInferer
from torch import nn
from torch.utils.data import DataLoader

from common.detection.volume import VolumeDetector
from common.errors import BundleError
from common.methods.autoencoder import AutoencoderObjective
from common.methods.dae import DAE, DAEObjective
from common.networks.latent_space import LatentSpace
from common.networks.strided_autoencoder import StridedAutoencoderKL
from common.networks.weight_standardised_unet import WeightStandardisedUNet
from common.weights import load_weights
from common.workflows.slices import SliceDataset
from common.workflows.training import ObjectiveEvaluator, ObjectiveTrainer
from common.workflows.training_handlers import (
    Checkpoints,
    ExponentialMovingAverage,
    GradientClipping,
    SaveAutoencoder,
    SaveWeights,
    load_latent_space,
)

EPOCH_LENGTH = 3
TOTAL_EPOCHS = 2


def dataset():
    image = torch.rand(1, 8, 8, 6, generator=torch.Generator().manual_seed(0)) * 0.9 + 0.1
    return SliceDataset([{"image": image}], lambda item: {"image": MetaTensor(item["image"])})


class Run:
    """Everything that a training configuration builds; without noise, so that two runs can be compared."""

    def __init__(self, folder, epochs, seed=0, handlers=()):
        torch.manual_seed(seed)
        self.network = VolumeDetector(DAE(WeightStandardisedUNet(1, (4, 8), (2, 2))), {"upper": 0.8})
        self.objective = DAEObjective(self.network.detector, noise_std=0.0)
        self.optimizer = torch.optim.AdamW(self.objective.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, 0.01, total_steps=TOTAL_EPOCHS * EPOCH_LENGTH, cycle_momentum=False
        )
        self.weights = folder / "model.pt"
        self.trainer = ObjectiveTrainer(
            device=torch.device("cpu"),
            max_epochs=epochs,
            epoch_length=EPOCH_LENGTH,
            train_data_loader=DataLoader(dataset(), batch_size=2),
            network=self.objective,
            optimizer=self.optimizer,
            lr_scheduler=self.scheduler,
            inferer=SimpleInferer(),
            log_dir=str(folder),
            checkpoint_dir=str(folder / "checkpoints"),
            save=SaveWeights(self.network, str(self.weights)),
            evaluator=ObjectiveEvaluator(DataLoader(dataset(), batch_size=2)),
            max_norm=0.1,
            train_handlers=handlers,
        )
        self.average = self.trainer.average

    def run(self):
        self.trainer.run()
        return self


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("straight"), TOTAL_EPOCHS).run()


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resumed")
    Run(folder, 1).run()
    return Run(folder, TOTAL_EPOCHS, seed=1).run()  # other initial weights, which the checkpoint replaces


def assert_same_state(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], equal_nan=True, msg=lambda text, name=name: f"{name}: {text}")


def test_resumed_run_goes_on_where_the_first_one_stopped(straight, resumed):
    for run in (straight, resumed):
        assert run.trainer.state.epoch == TOTAL_EPOCHS
        assert run.trainer.state.iteration == TOTAL_EPOCHS * EPOCH_LENGTH
        assert run.average.n_averaged.item() == TOTAL_EPOCHS * EPOCH_LENGTH
        assert all(s["step"] == TOTAL_EPOCHS * EPOCH_LENGTH for s in run.optimizer.state.values())
        assert run.scheduler.last_epoch == TOTAL_EPOCHS * EPOCH_LENGTH
    assert resumed.optimizer.param_groups[0]["lr"] == pytest.approx(straight.optimizer.param_groups[0]["lr"])
    assert_same_state(resumed.objective.state_dict(), straight.objective.state_dict())
    assert_same_state(resumed.average.state_dict(), straight.average.state_dict())
    moments, expected = (run.optimizer.state_dict()["state"] for run in (resumed, straight))
    for index in expected:
        assert_same_state(moments[index], expected[index])


def test_weights_at_the_end_are_the_average_and_load_strictly(straight, resumed):
    for run in (straight, resumed):
        stored = load_weights(run.weights)
        network = VolumeDetector(DAE(WeightStandardisedUNet(1, (4, 8), (2, 2))), {"upper": 0.8})
        network.load_state_dict(stored)
        averaged = run.average.module.detector.state_dict()
        current = run.objective.detector.state_dict()
        for name, value in averaged.items():
            assert torch.equal(stored[f"detector.{name}"], value.half())
        assert any(not torch.equal(value, current[name]) for name, value in averaged.items())
    assert_same_state(load_weights(resumed.weights), load_weights(straight.weights))


def test_only_the_newest_checkpoint_is_kept(straight, resumed):
    for run in (straight, resumed):
        folder = run.weights.parent / "checkpoints"
        assert [path.name for path in folder.iterdir()] == [f"checkpoint_epoch={TOTAL_EPOCHS}.pt"]


def test_finished_run_ends_at_once_and_writes_the_weights_again(straight):
    folder = straight.weights.parent
    expected = load_weights(straight.weights)
    straight.weights.unlink()
    again = Run(folder, TOTAL_EPOCHS, seed=2).run()
    assert again.trainer.state.iteration == TOTAL_EPOCHS * EPOCH_LENGTH
    assert_same_state(load_weights(straight.weights), expected)


def test_checkpoint_survives_an_interruption_while_the_next_is_written(tmp_path, monkeypatch):
    save = torch.save

    def interrupted(value, path, *args, **kwargs):
        if "epoch=2" in str(path):
            Path(path).write_bytes(b"half")
            raise KeyboardInterrupt
        save(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Run(tmp_path, TOTAL_EPOCHS).run()
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint_epoch=1.pt"]
    resumed = Run(tmp_path, TOTAL_EPOCHS).run()
    assert resumed.average.n_averaged.item() == TOTAL_EPOCHS * EPOCH_LENGTH


def test_newest_checkpoint_is_found_by_number(tmp_path):
    checkpoints = Checkpoints(str(tmp_path), {"network": nn.Linear(1, 1)})
    for epoch, value in ((2, 2.0), (10, 10.0), (9, 9.0)):
        state = {"weight": torch.full((1, 1), value), "bias": torch.zeros(1)}
        torch.save({"network": state}, tmp_path / f"checkpoint_epoch={epoch}.pt")
    checkpoints(SimpleNamespace(state=SimpleNamespace(max_epochs=20, epoch=0)))
    assert checkpoints.state["network"].weight.item() == 10


def test_average_follows_the_weights_fast_at_first_and_slowly_later():
    network = nn.Linear(1, 1, bias=False)
    average = ExponentialMovingAverage(network, decay=0.9)
    values, expected = [3.0, 5.0, -1.0, *[2.0] * 200, 7.0], 0.0
    for step, value in enumerate(values):
        network.weight.data.fill_(value)
        average.update(None)
        decay = 0 if step == 0 else min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
        assert average.module.weight.item() == pytest.approx(expected, abs=1e-5)
    assert average.module.weight.item() == pytest.approx(2 + 0.1 * 5, abs=1e-3)
    assert network.weight.item() == 7


def test_average_keeps_buffers_up_to_date_and_the_network_out_of_its_state():
    network = nn.BatchNorm1d(2, affine=False)
    average = ExponentialMovingAverage(network)
    network.running_mean.fill_(3.0)
    average.update(None)
    assert average.module.running_mean.tolist() == [3.0, 3.0]
    assert all(name == "n_averaged" or name.startswith("module.") for name in average.state_dict())


@pytest.mark.parametrize(("scale", "expected"), [(100.0, 0.5), (0.001, None)])
def test_gradients_are_clipped_to_the_norm(scale, expected):
    network = nn.Linear(4, 3)
    (network(torch.ones(2, 4)).sum() * scale).backward()
    before = torch.cat([p.grad.flatten() for p in network.parameters()])
    GradientClipping(network, max_norm=0.5)(None)
    after = torch.cat([p.grad.flatten() for p in network.parameters()])
    assert after.norm().item() == pytest.approx(before.norm().item() if expected is None else expected, rel=1e-4)
    torch.testing.assert_close(after / after.norm(), before / before.norm())


def test_gradients_are_clipped_before_the_optimizer_steps(tmp_path):
    norms = []
    run = Run(tmp_path, 1)

    def observe(*_):
        norms.append(torch.cat([p.grad.flatten() for p in run.objective.parameters()]).norm().item())

    run.optimizer.register_step_pre_hook(observe)
    run.run()
    assert len(norms) == EPOCH_LENGTH
    assert max(norms) <= 0.1 + 1e-5


def test_progress_shows_the_loss(tmp_path, capsys):
    Run(tmp_path, 1).run()
    assert "loss=" in capsys.readouterr().err


def latent_space(channels=(4,)):
    torch.manual_seed(0)
    return LatentSpace(StridedAutoencoderKL(channels=channels, latent_channels=2, num_res_layers=1), 2)


def test_autoencoder_is_written_with_its_average_and_the_scale_of_the_training_latents(tmp_path):
    space, slices = latent_space(), dataset()
    average = ExponentialMovingAverage(AutoencoderObjective(space))
    for parameter in average.module.parameters():
        parameter.data.mul_(1.5)  # as if it had been trained: differs from the current weights
    trainer = SimpleNamespace(average=average, data_loader=DataLoader(slices))
    SaveAutoencoder(space, str(tmp_path / "autoencoder.pt"))(trainer)

    loaded = load_latent_space(latent_space(), str(tmp_path / "autoencoder.pt"), torch.device("cpu"))
    for name, value in average.module.autoencoder.state_dict().items():
        assert torch.equal(loaded.autoencoder.state_dict()[name], value.half().float())
    mean, _ = loaded.posterior(torch.stack([item["image"] for item in slices]))
    assert mean.std().item() == pytest.approx(1, abs=0.01)
    assert loaded.scale != 1


def test_latent_space_without_weights_is_refused(tmp_path):
    with pytest.raises(BundleError, match="no weights"):
        load_latent_space(latent_space(), str(tmp_path / "autoencoder.pt"), torch.device("cpu"))
