"""What all losses promise, whatever their formula."""

from __future__ import annotations

import pytest
import torch

import distill.losses as L
from cache_service.errors import ConfigError

SUBSET = [0, 2]


def _wide(logits):
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _ddgsd(s, _t, y, temperature):
    targets_BC = L.label_targets(y, num_classes=s.shape[-1], dtype=s.dtype)
    views = L.SelfView(s[:, 0], s[:, 2], targets_BC), L.SelfView(s[:, 1], s[:, 3], targets_BC)
    return L.ddgsd_loss(L.ddgsd_terms(*views, temperature=temperature))


def _pskd(s, t, y, temperature):
    targets_BC = L.label_targets(y, num_classes=s.shape[-1])
    return L.pskd_loss(s[:, 0], targets_BC, t[:, 0], alpha=0.5)


def _specialist(s, t, y, temperature):
    subset = torch.tensor(SUBSET, device=s.device)
    return L.specialist_loss(s[:, 0, :3], t[:, 0], y, subset, temperature=temperature, alpha=0.5)


def _standardized(s, t, y, temperature):
    pair = L.standardize_logits(s), L.standardize_logits(t)
    return L.kd_loss(*pair, temperature=temperature)


# Student and teacher logits [B, R, C], labels [B], T. Losses without cells take cell 0.
LOSSES = {
    "kd_loss": lambda s, t, y, T: L.kd_loss(s, t, temperature=T),
    "kd_loss reverse": lambda s, t, y, T: L.kd_loss(s, t, temperature=T, direction="reverse"),
    "logit_matching_loss": lambda s, t, y, T: L.logit_matching_loss(s, t),
    "label_loss": lambda s, t, y, T: L.label_loss(s[:, 0], y, smoothing=0.1),
    "label_loss mixed": lambda s, t, y, T: L.label_loss(
        s[:, 0], y, (y + 1) % 6, torch.full_like(s[:, 0, 0], 0.25)
    ),
    "soft_cross_entropy": lambda s, t, y, T: L.soft_cross_entropy(s, _wide(t).softmax(-1)),
    "dkd_loss": lambda s, t, y, T: L.dkd_loss(s[:, 0], t[:, 0], y, temperature=T),
    "nkd_loss": lambda s, t, y, T: L.nkd_loss(s[:, 0], t[:, 0], y, temperature=T),
    "nkd_loss all": lambda s, t, y, T: L.nkd_loss(
        s[:, 0], t[:, 0], y, temperature=T, classes="all"
    ),
    "sdd_kd_loss": lambda s, t, y, T: L.sdd_kd_loss(s, t, y, temperature=T),
    "sdd_dkd_loss": lambda s, t, y, T: L.sdd_dkd_loss(s, t, y, temperature=T),
    "sdd_nkd_loss": lambda s, t, y, T: L.sdd_nkd_loss(s, t, y, temperature=T),
    "multi_teacher_soft_loss": lambda s, t, y, T: L.multi_teacher_soft_loss(
        [s[:, 0], s[:, 1]], [t[:, 0], t[:, 1]], temperature=T
    ),
    "multi_teacher_hard_loss": lambda s, t, y, T: L.multi_teacher_hard_loss(
        [s[:, 0]], [t[:, 0], t[:, 1]], temperature=T
    ),
    "kd_loss of an arithmetic ensemble": lambda s, t, y, T: L.kd_loss(
        s[:, 0], L.ensemble_logits([t[:, 0], t[:, 1]], temperature=T), temperature=T
    ),
    "kd_loss of a geometric ensemble": lambda s, t, y, T: L.kd_loss(
        s[:, 0],
        L.ensemble_logits([t[:, 0], t[:, 1]], temperature=T, mean="geometric"),
        temperature=T,
    ),
    "specialist_loss": _specialist,
    "ddgsd_loss": _ddgsd,
    "pskd_loss": _pskd,
    "virtual_teacher_loss": lambda s, t, y, T: L.virtual_teacher_loss(s[:, 0], y, temperature=T),
    "cskd_loss": lambda s, t, y, T: L.cskd_loss(s[:, 0], t[:, 0], temperature=T),
    "peer_losses": lambda s, t, y, T: L.peer_losses([s[:, 0], t[:, 0]], y, temperature=T)[0],
    "peer_match_loss": lambda s, t, y, T: L.peer_match_loss(
        s[:, 0], [t[:, 0], t[:, 1]], temperature=T
    ),
    "dist_loss": lambda s, t, y, T: L.dist_loss(s[:, 0], t[:, 0], temperature=T),
    "inter_class_loss": lambda s, t, y, T: L.inter_class_loss(s[:, 0], t[:, 0], temperature=T),
    "intra_class_loss": lambda s, t, y, T: L.intra_class_loss(s[:, 0], t[:, 0], temperature=T),
    "mmd_loss": lambda s, t, y, T: L.mmd_loss(s[:, 0], s[:, 1]),
    "kd_loss of standardized logits": _standardized,
}

every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


@pytest.fixture(scope="session")
def draw(draw_logits, draw_labels):
    def draw_inputs(seed=0, dtype=torch.float64, scale=3.0):
        s, t = draw_logits(seed, 2, 4, 5, 6, scale=scale).to(dtype)
        return s, t, draw_labels(seed, 4, num_classes=6)

    return draw_inputs


def test_no_loss_is_left_out_of_these_promises():
    public = {name for name in L.__all__ if name.endswith(("_loss", "_losses"))}
    assert public <= {name.split()[0] for name in LOSSES}


@every_loss
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_gradient_is_that_of_the_value(draw, loss, temperature):
    s, t, y = draw(seed=3)
    assert torch.autograd.gradcheck(lambda s: loss(s, t, y, temperature), (s.requires_grad_(),))


@every_loss
@pytest.mark.parametrize(
    ("given", "returned"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_a_loss_is_one_number_in_float32_or_wider(draw, loss, given, returned):
    s, t, y = draw(dtype=given)
    value = loss(s, t, y, 4.0)
    assert value.shape == ()
    assert value.dtype == returned
    wide = loss(s.to(returned), t.to(returned), y, 4.0)
    assert torch.allclose(value, wide, rtol=1e-6, atol=0.0)


@every_loss
def test_autocast_changes_nothing(draw, loss):
    s, t, y = draw(dtype=torch.float32)
    plain = loss(s, t, y, 4.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = loss(s, t, y, 4.0)
    assert cast.dtype == torch.float32
    assert torch.equal(cast, plain)


@every_loss
def test_inputs_are_left_as_they_were(draw, loss):
    s, t, y = draw()
    copies = s.clone(), t.clone(), y.clone()
    loss(s.requires_grad_(), t, y, 4.0).backward()
    for given, copy in zip((s, t, y), copies, strict=True):
        assert torch.equal(given, copy)
        assert given._version == 0


@every_loss
def test_no_gradient_reaches_the_teacher(draw, loss):
    s, t, y = draw()
    (gradient,) = torch.autograd.grad(
        loss(s.requires_grad_(), t.requires_grad_(), y, 4.0), t, allow_unused=True
    )
    assert gradient is None


@every_loss
def test_an_offset_of_all_logits_changes_nothing(draw, loss):
    s, t, y = draw()
    moved = loss(s + 50.0, t - 20.0, y, 4.0)
    assert moved.item() == pytest.approx(loss(s, t, y, 4.0).item(), rel=1e-9, abs=1e-12)


@every_loss
def test_the_order_of_the_batch_does_not_matter(draw, loss):
    s, t, y = draw()
    order = torch.tensor([2, 0, 3, 1])
    shuffled = loss(s[order], t[order], y[order], 4.0)
    assert shuffled.item() == pytest.approx(loss(s, t, y, 4.0).item(), rel=1e-12)


@every_loss
@pytest.mark.parametrize("temperature", [0.1, 1.0, 100.0])
@pytest.mark.parametrize("kind", ["opposed", "offset", "one", "equal"])
def test_extreme_logits_are_finite_and_right_in_float32(draw, loss, temperature, kind):
    s, t, y = draw(seed=5, dtype=torch.float32, scale=1.0)
    if kind == "opposed":
        s, t = 1e4 * s.sign(), 1e4 * t.sign()
    elif kind == "offset":
        s, t = s + 1e4, t - 1e4
    elif kind == "one":
        s = torch.where(torch.arange(6) == 1, 1e4, s)
        t = torch.where(torch.arange(6) == 3, 1e4, t)
    else:
        s, t = torch.full_like(s, -1e4), torch.full_like(t, 1e4)
    s.requires_grad_()
    value = loss(s, t, y, temperature)
    (gradient,) = torch.autograd.grad(value, s)
    assert torch.isfinite(value)
    assert torch.isfinite(gradient).all()
    exact = loss(s.double(), t.double(), y, temperature)
    assert value.item() == pytest.approx(exact.item(), rel=2e-4, abs=2e-4)


DIVERGENCES = [
    "kd_loss",
    "kd_loss reverse",
    "dkd_loss",
    "sdd_kd_loss",
    "sdd_dkd_loss",
    "multi_teacher_soft_loss",
    "cskd_loss",
    "peer_match_loss",
    "logit_matching_loss",
    "dist_loss",
    "kd_loss of standardized logits",
]


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_divergence_is_positive_and_nothing_at_equality(draw, name, dtype):
    for seed in range(10):
        s, t, y = draw(seed=seed, dtype=dtype)
        assert LOSSES[name](s, t, y, 10.0) > 0
    same = torch.cat([s[:, :1]] * 5, dim=1)
    # The published eps of DIST is part of its formula: 1e-8 over the spreads, times T**2.
    error = 1e-3 if name == "dist_loss" else 1e-6
    assert LOSSES[name](same, same, y, 10.0).item() == pytest.approx(0.0, abs=error)


@every_loss
def test_no_loss_makes_a_tensor_on_another_device(draw, loss):
    s, t, y = (x.to("meta") for x in draw(dtype=torch.float32))
    assert loss(s, t, y, 4.0).device.type == "meta"


@pytest.mark.parametrize(
    "loss",
    [
        L.kd_loss,
        L.logit_matching_loss,
        L.dist_loss,
        lambda student, teacher: L.dkd_loss(student, teacher, torch.zeros(5, dtype=torch.int64)),
        lambda student, teacher: L.nkd_loss(student, teacher, torch.zeros(5, dtype=torch.int64)),
    ],
    ids=["kd", "logits", "dist", "dkd", "nkd"],
)
def test_logits_that_would_be_broadcast_over_other_views_are_refused(loss):
    # A batch of five views, and a recording of five cells, which fit each other by chance.
    student, teacher = torch.randn(5, 10), torch.randn(5, 5, 10)
    with pytest.raises(ConfigError, match=r"are \[5, 10\], those of the teacher \[5, 5, 10\]"):
        loss(student, teacher)
    assert torch.isfinite(loss(student, teacher[:, 0]))
