"""One update: what it computes, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch
from support.streams import MemoryStream, train_config

from distill.finite import NonFiniteCheck
from distill.step import TrainContext, train_step
from distill.students import make_student_state
from distill.trainer import accumulation_groups

CPU = torch.device("cpu")


def prepare(**changes):
    config = train_config("unused", **changes)
    stream = MemoryStream(config)
    return TrainContext(stream, CPU, NonFiniteCheck(CPU)), make_student_state(config, stream, CPU)


def update(context, student, group):
    (means,) = train_step(context, [student], group)
    return means


def weights(student):
    return {name: value.clone() for name, value in student.model.state_dict().items()}


def distance(before, after):
    return sum((after[name] - before[name]).square().sum() for name in before).sqrt()


def test_two_small_batches_equal_one_large_one():
    context, student = prepare(batch_size=3)
    many = update(context, student, [context.stream.batch(0), context.stream.batch(1)])
    whole_context, whole = prepare(batch_size=6)
    one = update(whole_context, whole, [whole_context.stream.batch(0)])
    torch.testing.assert_close(weights(student), weights(whole))
    assert many.names == one.names
    torch.testing.assert_close(many.values_V, one.values_V)


def test_batches_of_unequal_size_count_by_their_views():
    context, student = prepare(batch_size=6)
    batch = context.stream.batch(0)
    parts = [
        batch._replace(
            images_BHW3=batch.images_BHW3[part],
            labels_B=batch.labels_B[part],
            partner_labels_B=batch.partner_labels_B[part],
            weights_B=batch.weights_B[part],
            samples_B=batch.samples_B[part],
            rows=({"logits": batch.rows[0]["logits"][part]},),
        )
        for part in (slice(0, 4), slice(4, 6))
    ]
    update(context, student, parts)
    whole_context, whole = prepare(batch_size=6)
    update(whole_context, whole, [batch])
    torch.testing.assert_close(weights(student), weights(whole))


def test_groups_never_reach_over_the_end_of_an_epoch():
    context, _ = prepare(batch_size=4)  # 22 views: 6 batches an epoch
    groups = accumulation_groups(context.stream.batches(0), 4, 6)
    steps = [[batch.cursor.step for batch in group] for group in groups]
    assert steps == [[0, 1, 2, 3], [4, 5], [6, 7, 8, 9], [10, 11]]


@pytest.mark.parametrize("amp", ["none", "float16"])
def test_a_clipped_gradient_has_the_norm_asked_for(amp):
    # float16 gradients are scaled up by 65536; the bound is for the true ones.
    context, student = prepare(clip_grad_norm=1e-3, amp=amp, optimizer__momentum=0, optimizer__lr=1)
    before = weights(student)
    update(context, student, [context.stream.batch(0)])
    assert distance(before, weights(student)) == pytest.approx(1e-3, rel=1e-3)


def test_a_gradient_under_the_bound_is_left_alone():
    context, student = prepare(clip_grad_norm=1e6)
    update(context, student, [context.stream.batch(0)])
    plain_context, plain = prepare()
    update(plain_context, plain, [plain_context.stream.batch(0)])
    assert distance(weights(student), weights(plain)) == 0


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_mixed_precision_computes_nearly_the_same_update(amp):
    context, student = prepare(amp=amp, student__model="support.streams:normed_net")
    types = []
    student.model.head.register_forward_hook(lambda *call: types.append(call[2].dtype))
    before = weights(student)
    means = update(context, student, [context.stream.batch(0)]).floats()
    plain_context, plain = prepare(student__model="support.streams:normed_net")
    wanted = update(plain_context, plain, [plain_context.stream.batch(0)]).floats()
    assert types == [getattr(torch, amp)]
    assert means["loss"] == pytest.approx(wanted["loss"], rel=0.02)
    moved = distance(before, weights(plain))
    assert 0 < distance(weights(student), weights(plain)) < 0.1 * moved


def test_a_teachers_rows_are_decoded_in_float32_under_mixed_precision():
    context, student = prepare(amp="bfloat16")
    batch = context.stream.batch(0)
    asked = []

    def teacher_logits(batch, *, temperature, cache):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
        asked.append((temperature, cache, product.dtype, torch.is_grad_enabled()))
        return batch.rows[cache]["logits"]

    context.stream.teacher_logits = teacher_logits
    update(context, student, [batch])
    assert asked == [(4.0, 0, torch.float32, False)]


def test_channels_last_changes_the_layout_and_not_the_loss():
    context, student = prepare(channels_last=True)
    assert student.model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    layouts = []
    student.model.register_forward_pre_hook(
        lambda _, inputs: layouts.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    means = update(context, student, [context.stream.batch(0)]).floats()
    plain_context, plain = prepare()
    wanted = update(plain_context, plain, [plain_context.stream.batch(0)]).floats()
    assert layouts == [True]
    assert means == pytest.approx(wanted, rel=1e-5)


def test_the_average_follows_every_update():
    context, student = prepare(ema=0.75)
    before = weights(student)
    update(context, student, [context.stream.batch(0)])
    for name, value in student.average.model.state_dict().items():
        wanted = 0.75 * before[name] + 0.25 * student.model.state_dict()[name]
        torch.testing.assert_close(value, wanted)


def test_dropout_is_a_function_of_seed_and_step():
    def loss(seed, step):
        context, student = prepare(student__model_args={"dropout": 0.5}, student__seed=0, seed=seed)
        torch.rand(seed + step + 1)  # whatever was drawn before
        cursor = context.stream.batch(0).cursor._replace(step=step)
        return update(context, student, [context.stream.batch(0)._replace(cursor=cursor)]).floats()

    assert loss(1, 5) == loss(1, 5)
    assert loss(1, 5)["loss"] != loss(1, 6)["loss"]
    assert loss(1, 5)["loss"] != loss(2, 5)["loss"]


def test_terms_add_up_to_the_loss():
    context, student = prepare(method={"name": "sd-kd"})
    means = update(context, student, [context.stream.batch(0)]).floats()
    weights = {"weight_consistent", "weight_complementary"}
    assert set(means) == {"loss", "loss_label", "loss_soft", "top1", "complementary"} | weights
    assert means["loss"] == pytest.approx(means["loss_label"] + means["loss_soft"])
