"""What makes random shifts of latents true samples, and what the gates of the operator can do."""

from __future__ import annotations

import pytest
import torch
from test_unroll import configured

from shodh.config import OperatorConfig, TokenizerConfig
from shodh.models.init import initialise
from shodh.models.operator import LatentTransformer
from shodh.models.tokenizer import PATCH, PatchBasis, Tokenizer
from shodh.schema.domain import Domain, add_walls, extend_into_solids
from shodh.schema.fields import Field
from shodh.schema.measures import measure
from shodh.train.operator_task import roll_samples

FIELDS = (Field("velocity", "vector", placement="face", solenoidal=True), Field("tracer", masked_by="solid"))
GRID = (24, 16, 32)


def test_tokenizer_commutes_with_shifts_by_whole_latent_cells_along_periodic_axes() -> None:
    domain = Domain(("periodic", "periodic", "wall"), (1.0, 2.0, 1.0))
    config = TokenizerConfig(latent_channels=6, strides=(4, 2), widths=(8, 16), head_channels=8)
    model = Tokenizer(config, FIELDS, (Field("solid", static=True),))
    initialise(model, 0)
    draw = torch.Generator().manual_seed(0)
    model.basis.heads["velocity+tracer"].fit(torch.randn(300, 4 * PATCH**3, generator=draw))
    fields = torch.randn(1, 4, *GRID, generator=draw)
    solid = (torch.rand(1, 1, *GRID, generator=draw) < 0.3).float()
    cells = (2, 1, 0)
    shift = [PATCH * n for n in cells]
    axes = (2, 3, 4)

    def run(fields: torch.Tensor, solid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        geometry = add_walls(solid, domain)
        latent = model.encode(fields, geometry)
        return latent, model.decode(latent, geometry, [domain], torch.tensor([0]))

    with torch.no_grad():
        latent, decoded = run(fields, solid)
        moved_latent, moved = run(fields.roll(shift, axes), solid.roll(shift, axes))
    torch.testing.assert_close(moved_latent, latent.roll(cells, axes), rtol=0, atol=1e-5)
    torch.testing.assert_close(moved, decoded.roll(shift, axes), rtol=0, atol=1e-4)
    assert not torch.allclose(moved, decoded, atol=0.1)


def test_patch_basis_is_the_best_linear_autoencoder() -> None:
    draw = torch.Generator().manual_seed(0)
    basis = PatchBasis(1, 5)
    patches = torch.randn(400, 5, generator=draw) @ torch.randn(5, PATCH**3, generator=draw)
    basis.fit(patches)
    fields = torch.empty(2, 1, PATCH, PATCH, PATCH)
    fields.view(2, -1).copy_(patches[:2])
    latent = basis.encode(fields)
    torch.testing.assert_close(basis.decode(latent), fields, rtol=0, atol=1e-4)
    noise = torch.randn(2, 1, PATCH, PATCH, PATCH, generator=draw)
    inside = basis.decode(basis.encode(noise))
    torch.testing.assert_close(basis.decode(basis.encode(inside)), inside, rtol=0, atol=1e-5)
    assert float(measure("l2re", inside, noise).min()) > 0.9  # Five directions hold little of noise.


def test_gates_of_one_continue_a_steady_change() -> None:
    """With the residual at zero and the gates at one the prediction is 2 z_t - z_(t-1), whatever the sizes."""
    config = OperatorConfig(dim=16, depth=1, heads=2)
    model = LatentTransformer(config, 3, 2, (2, 2, 2), 2)
    initialise(model, 0)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor([0.0] * 3 + [1.0] * 3))
        start, change = torch.randn(2, 3, 2, 2, 2), 100 * torch.randn(2, 3, 2, 2, 2)
        output = model(torch.stack((start, start + change), 1), torch.zeros(2, 2, 2, 2, 2))
    torch.testing.assert_close(output.latent, start + 2 * change, rtol=0, atol=1e-3)


def test_masked_scalar_is_continued_without_a_jump_and_unchanged_outside() -> None:
    x = torch.linspace(0, 2 * torch.pi, 17)[:16]
    smooth = (2 + torch.sin(x)).view(1, 1, 16, 1, 1).expand(1, 1, 16, 8, 8)
    solid = torch.zeros(1, 1, 16, 8, 8)
    solid[:, :, 4:7, 2:5, 2:5] = 1
    filled = extend_into_solids(smooth * (1 - solid), solid)
    torch.testing.assert_close(filled * (1 - solid), smooth * (1 - solid))
    assert float((filled - smooth).abs().max()) < 0.4
    assert float((smooth * solid).max()) > 2.5  # What a jump to zero would have been.


@pytest.mark.parametrize("lead", [(), (3,), (2, 5)])
def test_samples_are_rolled_as_one_by_one(lead: tuple[int, ...]) -> None:
    values = torch.randn(4, *lead, 3, 5, 4)
    shifts = torch.tensor([[0, 0, 0], [1, 4, 3], [2, 0, 1], [0, 3, 0]])
    alone = [row.roll(tuple(by), (-3, -2, -1)) for row, by in zip(values, shifts.tolist(), strict=True)]
    assert torch.equal(roll_samples(values, shifts), torch.stack(alone))


def test_samples_of_two_dimensions_are_rolled_as_one_by_one() -> None:
    values, shifts = torch.randn(3, 2, 5, 4), torch.tensor([[0, 3], [4, 0], [2, 1]])
    alone = [row.roll(tuple(by), (-2, -1)) for row, by in zip(values, shifts.tolist(), strict=True)]
    assert torch.equal(roll_samples(values, shifts), torch.stack(alone))


def test_jitter_is_less_than_a_patch_along_periodic_axes_and_moves_frames_and_masks_alike() -> None:
    task, _, batch = configured("fields")
    experts = task.operator.model_copy(update={"patch_jitter": True, "patch": 4})
    task.operator = experts
    seen = set()
    for step in range(40):
        frames, static, shifts = task._shift(batch, step)
        assert shifts is not None and int(shifts.max()) < 4 and shifts[:, 1].tolist() == [0, 0]  # A wall.
        plain, given = task._windows(batch)
        for b, by in enumerate(shifts.tolist()):
            assert torch.equal(frames[b], plain[b].roll(tuple(by), (-3, -2, -1)))
            assert torch.equal(static[b], given[b].roll(tuple(by), (-3, -2, -1)))
        again = task._shift(batch, step)[2]
        assert again is not None and torch.equal(again, shifts)
        seen |= {tuple(row) for row in shifts.tolist()}
    assert seen == {(x, 0, z) for x in range(4) for z in range(4)}
