"""Simplex noise against the reference program (golden/ano_ddpm/README.md) and the package `opensimplex`."""

import re

import numpy as np
import pytest
import torch
from arrays import golden
from torch.utils._python_dispatch import TorchDispatchMode

from common.diffusion.simplex import SimplexNoise, permutation, simplex

TOLERANCE_3D = 2e-4  # of one octave; the reference leaves out some far vertices


class CountOperations(TorchDispatchMode):
    """Counts the operations on tensors."""

    number = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.number += 1
        return operation(*args, **(kwargs or {}))


def fields():
    """Name, expected field, and the arguments that it was made with."""
    pattern = r"(fixedT|oct2d)_seed(\d+)(?:_T(\d+))?_(\d+)x(\d+)_o(\d)_p([\d.]+)_f(\d+)"
    for name, expected in golden("ano_ddpm/simplex_fields").items():
        if found := re.fullmatch(pattern, name):
            kind, seed, t, height, width, octaves, persistence, frequency = found.groups()
            mode = "3d" if kind == "fixedT" else "2d"
            noise = SimplexNoise(int(octaves), float(persistence), float(frequency), mode)
            yield pytest.param(noise, (int(height), int(width)), int(t or 0), int(seed), expected, id=name)


@pytest.mark.parametrize("seed", [3, 42, -7, 1, 123456789, -9999999999])
def test_permutation_of_a_seed(seed):
    expected = golden("ano_ddpm/simplex_perm")[f"perm_seed{seed}"]
    assert torch.equal(permutation(torch.tensor([0, seed]))[1], expected)


@pytest.mark.parametrize("seed", [3, 42, -7])
def test_values_at_points(seed):
    g, perm = golden("ano_ddpm/simplex_points"), permutation(torch.tensor([seed]))
    points = [column[None] for column in g["points_xyz"].T]
    exact = simplex(points[:2], perm, torch.float64)[0]
    torch.testing.assert_close(exact, g[f"noise2_seed{seed}"], atol=1e-12, rtol=0)
    torch.testing.assert_close(simplex(points, perm)[0].double(), g[f"noise3_seed{seed}"], atol=TOLERANCE_3D, rtol=0)


@pytest.mark.parametrize(("noise", "size", "t", "seed", "expected"), list(fields()))
def test_fields(noise, size, t, seed, expected):
    amplitude = sum(noise.persistence**k for k in range(noise.octaves))
    field = noise.field(size, torch.tensor([t]), torch.tensor([seed]))[0]
    assert field.shape == size
    assert expected.std() > 0.02
    tolerance = TOLERANCE_3D * amplitude if noise.mode == "3d" else 3e-6
    torch.testing.assert_close(field.double(), expected, atol=tolerance, rtol=0)


def test_field_of_pddpm():
    field = SimplexNoise(mode="2d").field((8, 8), torch.tensor([499]), torch.tensor([42]))[0]
    torch.testing.assert_close(field.double(), golden("pddpm/noise2d_seed42_8x8")["noise"], atol=3e-6, rtol=0)
    assert field[0, 0].abs() < 1e-6  # of every octave, which is why AnoDDPM has planes of 3D noise


@pytest.mark.parametrize("seed", [1, 2**61 + 12345])
def test_package_opensimplex_as_oracle(seed):
    opensimplex = pytest.importorskip("opensimplex", reason="pip install opensimplex")
    oracle, perm = opensimplex.OpenSimplex(seed), permutation(torch.tensor([seed]))
    points = np.random.default_rng(0).uniform(-300, 300, (3, 2000))
    tensors = [torch.from_numpy(p)[None] for p in points]
    plane = [oracle.noise2(x, y) for x, y, _ in points.T]
    space = [oracle.noise3(*point) for point in points.T]
    np.testing.assert_allclose(simplex(tensors[:2], perm, torch.float64)[0].numpy(), plane, atol=1e-11)
    np.testing.assert_allclose(simplex(tensors, perm, torch.float64)[0].numpy(), space, atol=TOLERANCE_3D)
    np.testing.assert_allclose(simplex(tensors, perm)[0].numpy(), space, atol=TOLERANCE_3D)


def test_work_is_not_done_point_by_point():
    """The number of tensor operations is the same for any size: a loop over points takes minutes for an image."""

    def operations(*size):
        with CountOperations() as counted:
            SimplexNoise().field(size, torch.tensor([100]), torch.tensor([42]))
        return counted.number

    assert operations(8, 8) == operations(64, 48) < 3000


def test_noise_of_a_batch_is_one_field_per_sample_and_channel():
    noise, x = SimplexNoise(), torch.zeros(3, 2, 12, 20)
    t = torch.tensor([5, 5, 700])
    result = noise(x, t, [torch.Generator().manual_seed(s) for s in (1, 2, 1)])
    assert result.shape == x.shape
    assert result.dtype == x.dtype
    planes = result.flatten(0, 1)
    assert all((planes[i] - planes[j]).abs().max() > 0.1 for i in range(6) for j in range(i))
    alone = noise(x[1:2], t[1:2], [torch.Generator().manual_seed(2)])
    torch.testing.assert_close(alone[0], result[1], atol=1e-6, rtol=0)


def test_field_is_smooth_in_t():
    fields = SimplexNoise().field((16, 16), torch.tensor([100.0, 100.1, 150.0]), torch.tensor([7, 7, 7]))
    assert 0 < (fields[1] - fields[0]).abs().max() < 0.3
    assert (fields[2] - fields[0]).abs().max() > 0.5


def test_global_generator_is_used_without_generators_and_only_then():
    noise, x, t = SimplexNoise(octaves=1), torch.zeros(1, 1, 8, 8), torch.tensor([3])
    torch.manual_seed(0)
    first, second = noise(x, t), noise(x, t)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(noise(x, t), first)
    state = torch.get_rng_state()
    noise(x, t, [torch.Generator().manual_seed(0)])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("mode", "std"), [("3d", 0.505), ("2d", 0.59)])
def test_published_amplitude(mode, std):
    field = SimplexNoise(mode=mode).field((64, 64), torch.arange(24) * 40, torch.arange(24))
    assert field.std().item() == pytest.approx(std, abs=0.06)
    assert field.abs().max() < 2.6


def test_autocast_of_the_training_does_not_round_the_noise():
    arguments = (16, 16), torch.tensor([100]), torch.tensor([42])
    expected = SimplexNoise().field(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(SimplexNoise().field(*arguments), expected)
