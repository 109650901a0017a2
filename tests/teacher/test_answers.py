from __future__ import annotations

import numpy as np
import pytest
import torch

from cache_service.errors import UnsupportedError
from cache_service.format.cells import expand_cells, num_cells
from cache_service.models.create import create_model
from cache_service.models.features import cell_logits
from cache_service.models.preprocess import prepare_views
from cache_service.teacher.teacher import exact_kernels

SCALES = (1, 2, 4)


def plain_answers(teacher, views, scales=SCALES):
    """What the same network says without any of the teacher's machinery."""
    model = create_model("resnet8x4", num_classes=10, seed=0).eval()
    images = prepare_views(views, teacher.id.preprocess, device="cpu")
    with torch.no_grad():
        return cell_logits(model, images, scales).numpy()


def test_the_whole_image_is_answered_as_by_the_network_itself(load, views):
    teacher = load()
    answers = teacher.answer(views)
    assert (answers.shape, answers.dtype) == ((6, 1, 10), np.float32)
    np.testing.assert_allclose(answers, plain_answers(teacher, views, (1,)), rtol=1e-4, atol=1e-5)


def test_stored_cells_give_back_every_cell(load, views):
    teacher = load(given={"scales": SCALES})
    assert teacher.stored_scales == (4,)
    assert (teacher.id.map_side, teacher.id.affine_head) == (8, True)
    cells = expand_cells(teacher.answer(views), SCALES, teacher.stored_scales)
    np.testing.assert_allclose(cells, plain_answers(teacher, views), rtol=1e-3, atol=1e-4)


def test_all_scales_are_stored_where_coarse_cells_do_not_follow_from_fine_ones(load, views):
    for teacher in (
        load(given={"scales": SCALES, "store_all": True}),  # topk
        load(given={"scales": (1, 3)}),  # 3 does not divide a map of 8
        load("test_convnext", given={"scales": (1, 2)}),  # a norm after pooling
    ):
        assert teacher.stored_scales[0] == 1
        assert teacher.answer(views).shape[1] == num_cells(teacher.stored_scales)


def test_chained_pooling_stores_the_finest_grid_whatever_the_map(load, views):
    teacher = load(pooling="chained", input_size=28, given={"scales": SCALES})
    assert (teacher.id.map_side, teacher.id.pooling) == (7, "chained")
    assert teacher.stored_scales == (4,)
    direct = load(input_size=28, given={"scales": SCALES})
    assert direct.stored_scales == SCALES
    assert not np.allclose(
        expand_cells(teacher.answer(views), SCALES, (4,)), direct.answer(views), atol=1e-4
    )


def test_chained_cells_are_the_means_of_the_finest_ones(load, views):
    given = {"scales": SCALES, "store_all": True}
    cells = load(pooling="chained", input_size=28, given=given).answer(views)
    np.testing.assert_allclose(
        cells, expand_cells(cells[:, 5:], SCALES, (4,)), rtol=1e-4, atol=1e-5
    )


def test_a_network_without_a_map_answers_for_the_whole_image_only(load, views, factories):
    teacher = load(f"{factories}:colors")
    assert teacher.answer(views).shape == (6, 1, 10)
    assert (teacher.id.map_side, teacher.stored_scales) == (None, (1,))
    with pytest.raises(UnsupportedError, match="feature map cannot be found"):
        load(f"{factories}:colors", given={"scales": SCALES})


def test_answers_do_not_depend_on_the_batch(load, views):
    teacher = load(given={"scales": SCALES})
    together = teacher.answer(views)
    alone = np.concatenate([teacher.answer(views[i : i + 1]) for i in range(len(views))])
    np.testing.assert_allclose(alone, together, rtol=1e-4, atol=1e-5)


def test_memory_format_changes_nothing_but_rounding(load, views):
    answers = [load(channels_last=on).answer(views) for on in (False, True)]
    np.testing.assert_allclose(*answers, rtol=1e-4, atol=1e-5)
    assert load(channels_last=False).id == load(channels_last=True).id


def test_bfloat16_rounds_the_answers_and_is_part_of_the_identity(load, views):
    exact, rounded = (
        load(given={"scales": SCALES}),
        load(precision="bfloat16", given={"scales": SCALES}),
    )
    difference = np.abs(exact.answer(views) - rounded.answer(views)).max()
    assert 0 < difference < 0.1 * np.abs(exact.answer(views)).max()
    assert rounded.answer(views).dtype == np.float32
    assert exact.id != rounded.id


def test_the_compiled_path_gives_the_same_answers(load, views):
    teacher = load(compile=True, given={"scales": SCALES, "want_features": True})
    plain = load(given={"scales": SCALES, "want_features": True})
    with torch.compiler.set_stance("force_eager"):  # generating the code takes half a minute
        assert np.array_equal(teacher.answer(views), plain.answer(views))
        assert np.array_equal(teacher.features(views), plain.features(views))
    assert teacher.id == plain.id


@pytest.mark.faults
def test_compiled_code_gives_the_same_answers(load, views):
    # Half a minute of code generation on two cores.
    teacher, plain = (load(compile=on, given={"scales": SCALES}) for on in (True, False))
    for count in (6, 2):
        answers = teacher.answer(views[:count]), plain.answer(views[:count])
        np.testing.assert_allclose(*answers, rtol=1e-4, atol=1e-5)


def test_features_and_head_give_the_logits(load, views):
    for scales in ((1,), SCALES):
        teacher = load(given={"scales": scales, "want_features": True})
        features = teacher.features(views)
        assert features.dtype == np.float32
        logits = features @ teacher.head.weight_CD.T + teacher.head.bias_C
        np.testing.assert_allclose(logits, teacher.answer(views), rtol=1e-4, atol=1e-5)


def test_features_need_a_linear_head(load):
    with pytest.raises(UnsupportedError, match=r"codec features needs .* test_convnext is more"):
        load("test_convnext", given={"want_features": True})


def test_features_that_were_not_asked_for_are_refused(load, views):
    with pytest.raises(UnsupportedError, match="loaded for logits"):
        load().features(views)


def test_non_finite_answers_are_passed_on(load, views, factories):
    teacher = load(f"{factories}:colors", mean=(0, 0, 0), std=(1e-38, 1e-38, 1e-38))
    assert not np.isfinite(teacher.answer(views)).all()  # the encoder refuses them by position


def test_exact_kernels_put_the_settings_back():
    before = torch.backends.cudnn.allow_tf32
    with exact_kernels():
        assert not torch.backends.cudnn.allow_tf32
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"
        assert torch.backends.cudnn.deterministic
    assert torch.backends.cudnn.allow_tf32 == before
