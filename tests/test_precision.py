"""Each loss term of MST-KDNet under bf16 autocast against float64, and terms with extreme constants at the edges of half precision."""

import pytest
import torch
from small_mst_kdnet import CROP, START, TERMS, make, make_batch

from mstkd.losses.distillation import attention_extremes
from mstkd.losses.style import reference_style_matching, style_matching

# Relative to the value in float64: about three times the largest found over eight seeds. bf16 keeps 8 bits, 0.4 % of a feature;
# the attention term squares products of maps, which multiplies that.
TOLERANCE = {
    "dice_teacher": 1e-3, "dice_student": 1e-3, "consistency": 4e-3, "kl": 5e-3, "content": 4e-3, "mst": 7e-3, "evd": 0.15, "gsm": 7e-3,
    "adversarial": 1e-3, "critic": 4e-4,
}  # fmt: skip
HALVES = [torch.float16, torch.bfloat16]


def terms(method, batch, autocast: bool) -> dict[str, float]:
    roles = method.roles("distill")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = roles["networks"].step.train()(batch, {}, START)
        critic = roles["critic"].step(batch, output.carry, START)
    scalars = {**output.scalars, **critic.scalars}
    if autocast:
        assert all(value.dtype == torch.float32 for value in scalars.values())
    return {name: value.item() for name, value in scalars.items()}


@pytest.mark.parametrize("units", [True, False])
def test_every_term_in_bf16_is_near_float64(units, monkeypatch):
    """With bf16 arithmetic, and as a CPU without bf16 units computes."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": units})
    torch.manual_seed(0)
    method, batch = make(), make_batch()
    rough = terms(method, batch, autocast=True)
    for network in method.networks.values():
        network.double()
    batch.image = batch.image.double()
    exact = terms(method, batch, autocast=False)
    assert exact.keys() == TOLERANCE.keys() == TERMS | {"critic"}
    found = {name: abs(rough[name] - value) / abs(value) for name, value in exact.items()}
    assert {name: error for name, error in found.items() if error > TOLERANCE[name]} == {}


# Terms with extreme constants: what the method hands them is float32, made from half-precision features.


def attention(tokens: int, sharpness: float) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return [(sharpness * torch.randn(1, 3, tokens, tokens, generator=generator, dtype=torch.float64)).softmax(-1) for _ in range(4)]


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize(("scale", "weight"), [(120.0, 1e8 / 120**4), (1.0, 1e8)])  # ours; the published constant on raw maps
def test_attention_term_survives_both_constants(half, scale, weight):
    full, missing = attention(120, 1.0), attention(120, 0.5)
    rough = [[m.to(half).float() for m in maps] for maps in (full, missing)]
    value, exact = (weight * attention_extremes(*maps, scale=scale).item() for maps in (rough, (full, missing)))
    assert exact > 0 and value == pytest.approx(exact, rel=2e-2)


def test_in_half_precision_the_published_attention_term_would_vanish():
    full, missing = attention(120, 0.1), attention(120, 0.05)
    assert attention_extremes(full, missing) > 0
    assert attention_extremes([m.half() for m in full], [m.half() for m in missing]) == 0
    assert torch.tensor(1e8, dtype=torch.float16).isinf()  # and its weight overflow


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("size", [1e-2, 1.0, 1e3])
def test_style_terms_neither_overflow_nor_vanish(half, size):
    generator = torch.Generator().manual_seed(0)
    full, missing = ([size * torch.randn(1, 16, 8, 8, 8, generator=generator, dtype=torch.float64) for _ in range(3)] for _ in range(2))
    rough = [[m.to(half).float() for m in maps] for maps in (full, missing)]
    for matching in (style_matching, reference_style_matching):
        value, exact = matching(*rough).item(), matching(full, missing).item()
        assert exact > 0 and value == pytest.approx(exact, rel=2e-2), matching.__name__


@pytest.mark.parametrize("options", [{}, {"reference_evd": True, "reference_scale": True, "reference_kl": True}])
def test_under_autocast_the_terms_are_computed_in_float32(options, monkeypatch):
    from mstkd.methods import mst_kdnet

    seen = set()
    for name in ("attention_extremes", "style_matching", "reference_style_matching", "standardised_kl", "reference_kl", "soft_dice"):
        original = getattr(mst_kdnet, name)

        def spy(*arguments, original=original, **named):
            flat = [t for a in arguments[:2] for t in (a if isinstance(a, tuple | list) else [a])]
            seen.update(t.dtype for t in flat)
            assert not torch.is_autocast_enabled("cpu")
            return original(*arguments, **named)

        monkeypatch.setattr(mst_kdnet, name, spy)
    torch.manual_seed(0)
    values = terms(make(**options), make_batch(crop=CROP), autocast=True)
    assert seen == {torch.float32}
    assert all(torch.tensor(value).isfinite() and value > 0 for value in values.values())
