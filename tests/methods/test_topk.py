"""Teachers that answer otherwise at each temperature, because their cache dropped classes."""

from __future__ import annotations

import pytest
import torch
from support import formulas
from support.steps import images_of, memory, settings_of, terms_of
from support.streams import plain_net

from cache_service.models.features import cell_logits

AT_1, AT_4 = 1.0, 4.0


@pytest.fixture
def stream():
    made = memory()
    made.facts = made.facts._replace(
        teachers=tuple(each._replace(drops_classes=True) for each in made.facts.teachers)
    )
    drawn = torch.Generator().manual_seed(5)
    moved = {AT_1: 0.0, AT_4: torch.randn(8, 5, 5, generator=drawn)}
    made.teacher_logits = lambda batch, *, temperature, cache: (
        batch.rows[cache]["logits"] + moved[temperature]
    )
    return made


@pytest.mark.parametrize("classes", ["others", "all"])
@pytest.mark.parametrize("name", ["nkd", "sd-nkd"])
def test_nkd_asks_for_its_target_at_1_and_for_the_rest_at_t(stream, name, classes):
    torch.manual_seed(3)
    model = plain_net()
    batch = stream.batch(0)
    settings = settings_of(
        name,
        temperature=AT_4,
        gamma=2,
        classes=classes,
        warmup_epochs=0,
        **({"complementary_weight": 1} if name == "sd-nkd" else {}),
    )
    terms, _ = terms_of(settings, stream, model)
    count = 5 if name == "sd-nkd" else 1
    z = cell_logits(model, images_of(stream), (1, 2)).detach().double()[:, :count]
    v_1, v_4 = (
        stream.teacher_logits(batch, temperature=each, cache=0)[:, :count].double()
        for each in (AT_1, AT_4)
    )
    labels = formulas.larger_part(batch)[:, None].expand(-1, count)
    target = formulas.nkd(z, v_1, labels, AT_4, 0.0, classes)
    rest = formulas.nkd(z, v_4, labels, AT_4, 2.0, classes)
    rest = rest - formulas.nkd(z, v_4, labels, AT_4, 0.0, classes)
    torch.testing.assert_close(
        terms["soft"].detach().double(), (target + rest).mean(), rtol=2e-5, atol=1e-6
    )
