"""The latent transformer: positions, tokens, samples, and its first prediction."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from shodh.config import OperatorConfig
from shodh.models.blocks import rotary_angles, rotary_tables, rotate, rotate_reference
from shodh.models.init import initialise
from shodh.models.operator import LatentTransformer
from shodh.moe.experts import ExpertLayerReference, FeedForward

GRID, HISTORY, LATENT, STATIC = (4, 2, 6), 3, 5, 7


def make(seed: int = 0, **settings: Any) -> LatentTransformer:
    experts = settings.pop("experts", {})
    config = OperatorConfig(dim=24, depth=2, heads=2, experts={"hidden": 16, **experts}, **settings)
    model = LatentTransformer(config, LATENT, STATIC, GRID, HISTORY)
    initialise(model, seed)
    return model


def inputs(batch: int = 3, grid: tuple[int, int, int] = GRID, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    history = torch.randn(batch, HISTORY, LATENT, *grid, generator=draw)
    return history, torch.randn(batch, STATIC, *grid, generator=draw)


@pytest.mark.parametrize("head_dim", [2, 6, 10, 32])
def test_rotary_attention_sees_offsets_alone(head_dim: int) -> None:
    grid = (3, 4, 5)
    angles = rotary_angles(grid, head_dim)
    assert angles.shape == (60, head_dim // 2) and angles.dtype == torch.float64
    tables = rotary_tables(angles)
    q, k = torch.randn(2, head_dim, dtype=torch.float64)
    at_q, at_k = rotate(q.expand(60, -1), *tables), rotate(k.expand(60, -1), *tables)
    torch.testing.assert_close(at_q.norm(dim=-1), q.norm().expand(60))
    score = (at_q @ at_k.T).view(*grid, *grid)
    # The same offset (1, 2, -1) from three places.
    places = [(0, 0, 1), (1, 1, 3), (1, 0, 4)]
    scores = torch.stack([score[x, y, z, x + 1, y + 2, z - 1] for x, y, z in places])
    torch.testing.assert_close(scores, scores[:1].expand(3))
    if head_dim >= 6:
        assert score.view(60, 60)[0].unique().numel() == 60, "every offset must look different"


def test_rotation_is_that_of_complex_numbers() -> None:
    x, angle = torch.randn(5, 8, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    expected = torch.view_as_complex(x.unflatten(-1, (4, 2))) * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(rotate(x, *rotary_tables(angle)), torch.view_as_real(expected).flatten(-2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_has_the_bits_of_its_definition(dtype: torch.dtype) -> None:
    """So that checkpoints, whose weights mean pairs, give what they gave: values and gradients."""
    angles = rotary_angles((3, 4, 5), 10)
    x = torch.randn(2, 60, 3, 10, dtype=dtype).transpose(1, 2).requires_grad_()
    own, other = (table.to(dtype) for table in rotary_tables(angles))
    pair = rotate(x, own, other), rotate_reference(x, angles.cos().to(dtype), angles.sin().to(dtype))
    assert torch.equal(*pair)
    weight = torch.randn(x.shape, dtype=dtype)
    assert torch.equal(*(torch.autograd.grad((y * weight).sum(), x)[0] for y in pair))


@pytest.mark.parametrize("patch", [1, 2])
def test_tokens_are_cut_and_put_together_again(patch: int) -> None:
    model = make(patch=patch)
    x = torch.randn(2, LATENT, *GRID)
    tokens = model._to_tokens(x)
    assert tokens.shape == (2, 48 // patch**3, LATENT * patch**3)
    assert torch.equal(model._from_tokens(tokens), x)


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("position", ["rotary", "learned"])
@pytest.mark.parametrize("kind", ["token", "context", "two_level"])
def test_samples_do_not_see_each_other_and_their_order_does_not_matter(patch: int, position: str, kind: str) -> None:
    model = make(patch=patch, position=position, experts={"router": {"kind": kind}})
    history, static = inputs()
    order = torch.tensor([2, 0, 1])
    plain, shuffled = model(history, static), model(history[order], static[order])
    assert plain.latent.shape == history[:, -1].shape and len(plain.routing) == 2
    torch.testing.assert_close(shuffled.latent, plain.latent[order])
    changed = history.clone()
    changed[1] += 1.0
    torch.testing.assert_close(model(changed, static).latent[[0, 2]], plain.latent[[0, 2]])


@pytest.mark.parametrize("position", ["rotary", "learned"])
def test_positions_matter(position: str) -> None:
    model = make(position=position, experts={"num_experts": 0})
    history, static = inputs(1)
    with torch.no_grad():
        model.head.weight.normal_()
        rolled = model(history.roll(1, -1), static.roll(1, -1)).latent.roll(-1, -1)
        difference = (rolled - model(history, static).latent).abs().max()
    assert difference > 1e-3


def test_first_prediction_is_close_to_persistence_and_depends_on_everything() -> None:
    model = make()
    history, static = (v.requires_grad_() for v in inputs())
    latent = model(history, static).latent
    step = (latent - history[:, -1]).square().mean().sqrt()
    assert 0.01 < step < 0.3
    (latent - history[:, -1]).square().sum().backward()
    assert all((history.grad[:, t].abs().amax() > 0) for t in range(HISTORY)) and static.grad.abs().amax() > 0


def test_activation_checkpointing_changes_nothing_but_memory() -> None:
    gradients, latents = [], []
    for checkpointing in (False, True):
        model = make(activation_checkpointing=checkpointing, experts={"top_k": 2})
        output = model(*inputs())
        (output.latent.square().mean() + output.routing[1].probs.square().sum()).backward()
        latents.append(output.latent)
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert torch.equal(*latents)
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("num_shared", "top_k"), [(1, 1), (2, 2), (0, 1)])
def test_dense_baseline_has_the_active_size_of_the_sparse_model(num_shared: int, top_k: int) -> None:
    sparse = make(experts={"num_experts": 4, "num_shared": num_shared, "top_k": top_k})
    dense = make(experts={"num_experts": 0, "num_shared": num_shared, "top_k": top_k})
    assert isinstance(dense.blocks[0].feed_forward, FeedForward) and dense(*inputs()).routing == []
    layer = sparse.blocks[0].feed_forward
    assert isinstance(layer, ExpertLayerReference)
    shared = sum(p.numel() for p in layer.shared_experts.parameters()) if num_shared else 0
    active = shared + top_k * sum(p[0].numel() for p in layer.experts.parameters())
    assert sum(p.numel() for p in dense.blocks[0].feed_forward.parameters()) == active


def test_half_precision_model_keeps_the_residual_in_float32() -> None:
    model = make()
    exact = model(*inputs()).latent
    output = model.to(torch.bfloat16)(*inputs())
    assert output.latent.dtype == torch.float32
    step, exact_step = output.latent - inputs()[0][:, -1], exact - inputs()[0][:, -1]
    assert (step - exact_step).norm() < 0.1 * exact_step.norm()


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    torch.manual_seed(0)
    first = make(seed=3).state_dict()
    torch.manual_seed(1)
    deeper = LatentTransformer(
        OperatorConfig(dim=24, depth=3, heads=2, experts={"hidden": 16}), LATENT, STATIC, GRID, HISTORY
    )
    initialise(deeper, 3)
    for name, tensor in first.items():
        found = deeper.state_dict()[name]
        if name.endswith(("attention.out.weight", "experts.w2", "shared_experts.w2.weight")):  # scaled by the depth
            torch.testing.assert_close(found, tensor * (4 / 6) ** 0.5)
        else:
            assert torch.equal(found, tensor), name
    other = make(seed=4).state_dict()
    assert not torch.equal(other["blocks.0.attention.qkv.weight"], first["blocks.0.attention.qkv.weight"])


def test_initialisation_skips_parameters_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = LatentTransformer(OperatorConfig(dim=24, heads=2), LATENT, STATIC, GRID, HISTORY)
    initialise(model, 0)
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("modes", [None, 1])
def test_fourier_mixing_takes_the_place_of_attention(modes: int | None) -> None:
    """Every token sees all others through it, samples stay apart, and all of its weights are trained."""
    model = make(mixer="fourier", modes=modes, experts={"num_experts": 0})
    assert not any("attention" in name for name, _ in model.named_parameters())
    for block in model.blocks:
        for parameter in block.mixing.parameters():
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    history, static = inputs()
    history.requires_grad_()
    output = model(history, static).latent
    output[0, :, 0, 0, 0].sum().backward()
    assert history.grad is not None
    seen = history.grad.abs().amax((1, 2))
    assert bool((seen[0] > 0).all()) and bool((seen[1:] == 0).all())
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in model.blocks[0].mixing.parameters())
