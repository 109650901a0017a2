"""Vision transformers with distillation tokens, and what `soft` and `hard` make of them."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from support import formulas
from support.builds import record_toy
from support.steps import images_of, memory, settings_of, terms_of
from support.streams import SIDE, plain_net
from support.toys import NUM_CLASSES

from cache_service.errors import ConfigError, UnsupportedError
from cache_service.models.create import create_model
from cache_service.models.features import check_cells
from cache_service.models.weights import load_checkpoint
from distill.methods.multi_teacher import HeadedStudent
from distill.tokens import TokenViT

SMALL = {"img_size": SIDE, "patch_size": 4, "depth": 2, "embed_dim": 12, "num_heads": 2}
NAME = "distill.tokens:vit_tokens"


def vit(num_tokens=2, *, backbone="vit_tiny_patch16_224", seed=0, **changes):
    return create_model(
        NAME,
        num_classes=NUM_CLASSES,
        seed=seed,
        **({"backbone": backbone, "num_tokens": num_tokens} | SMALL | changes),
    )


@pytest.fixture
def images():
    return torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("num_tokens", [1, 2, 3])
def test_each_token_has_a_head_of_its_own(images, num_tokens):
    model = vit(num_tokens).eval()
    answer = model.forward_heads(images)
    assert len(answer.teachers) == num_tokens == model.num_teacher_heads
    every = [answer.label_BC, *answer.teachers]
    assert all(logits_BC.shape == (3, NUM_CLASSES) for logits_BC in every)
    torch.testing.assert_close(model(images), torch.stack(every).mean(0))


@pytest.mark.parametrize("kind", ["reg_token", "pos_embed"])
def test_new_tokens_start_apart_because_alike_they_would_stay_alike(kind):
    tokens_ND = getattr(vit(3, embed_dim=192).backbone, kind)[0, -3 - 4 * (kind != "reg_token") :]
    tokens_ND = tokens_ND[:3]
    assert tokens_ND.std().item() == pytest.approx(0.02, rel=0.1)
    assert all((tokens_ND[i] - tokens_ND[i - 1]).norm() > 0.2 for i in range(3))


def test_the_plain_answer_is_one_tensor_in_every_mode(images):
    model = vit()
    assert model.train()(images).shape == model.eval()(images).shape == (3, NUM_CLASSES)


def test_a_head_reads_its_own_token_behind_the_class_token(images):
    model = vit(2).eval()
    features_BLD = model.backbone.forward_features(images)
    assert features_BLD.shape == (3, 1 + 2 + 4, 12)
    answer = model.forward_heads(images)
    torch.testing.assert_close(answer.label_BC, model.backbone.head(features_BLD[:, 0]))
    for token, logits_BC in enumerate(answer.teachers):
        torch.testing.assert_close(logits_BC, model.heads[token](features_BLD[:, 1 + token]))


def test_a_token_meets_the_norm_that_stands_behind_the_pooling(images):
    model = vit(2, global_pool="avg").eval()
    torch.nn.init.normal_(model.backbone.fc_norm.weight)
    tokens_BND = model.backbone.fc_norm(model.backbone.forward_features(images)[:, 1:3])
    for token, logits_BC in enumerate(model.forward_heads(images).teachers):
        torch.testing.assert_close(logits_BC, model.heads[token](tokens_BND[:, token]))


@pytest.mark.parametrize(
    ("backbone", "changes"),
    [
        ("vit_tiny_patch16_224", {}),
        ("deit3_small_patch16_224", {}),  # positions for patches alone
        ("vit_tiny_patch16_224", {"reg_tokens": 3}),
        ("vit_tiny_patch16_224", {"global_pool": "avg"}),  # the norm stands behind the pooling
        ("vit_tiny_patch16_224", {"patch_drop_rate": 0.5}),
        ("vit_tiny_patch16_224", {"pos_embed": "none"}),
    ],
)
def test_a_trained_backbone_keeps_its_weights_and_sees_its_tokens_where_they_were(
    images, backbone, changes
):
    plain = timm.create_model(backbone, num_classes=NUM_CLASSES, **(SMALL | changes)).eval()
    if plain.pos_embed is not None:
        torch.nn.init.normal_(plain.pos_embed)
    model = TokenViT(copy.deepcopy(plain), 2).eval()
    first = plain.num_prefix_tokens
    before = plain._pos_embed(plain.patch_embed(images))
    after = model.backbone._pos_embed(model.backbone.patch_embed(images))
    kept = [*range(first), *range(first + 2, after.shape[1])]
    torch.testing.assert_close(after[:, kept], before)
    assert (model.first_token, model.backbone.num_prefix_tokens) == (first, first + 2)
    assert model.backbone.num_reg_tokens == plain.num_reg_tokens + 2
    for name, value in plain.state_dict().items():
        if name not in {"pos_embed", "reg_token"}:
            assert torch.equal(model.backbone.state_dict()[name], value)
    model.train()(images).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_dropping_patches_never_drops_a_distillation_token(images):
    model = vit(2, patch_drop_rate=0.5).train()
    assert model.backbone.forward_features(images).shape[1] == 1 + 2 + 4 // 2


def test_weights_come_back_from_their_file(images, tmp_path):
    model = vit(2, seed=1)
    torch.save(model.state_dict(), tmp_path / "student.pt")
    rebuilt = create_model(
        NAME,
        num_classes=NUM_CLASSES,
        **({"backbone": "vit_tiny_patch16_224", "num_tokens": 2} | SMALL),
    )
    load_checkpoint(rebuilt, tmp_path / "student.pt")
    assert torch.equal(rebuilt.eval()(images), model.eval()(images))
    assert not torch.equal(vit(2, seed=2).eval()(images), model(images))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_tokens": 0}, "num_tokens=0 is not a number"),
        ({"num_tokens": -1}, "num_tokens=-1 is not a number"),
        ({"num_tokens": True}, "num_tokens=True is not a number"),
        ({"num_tokens": 1.5}, "num_tokens=1.5 is not a number"),
        ({"num_tokens": "2"}, "num_tokens='2' is not a number"),
        ({"backbone": "vit_tiny"}, "there is no model 'vit_tiny'"),
        (
            {"backbone": "deit_tiny_distilled_patch16_224"},
            "has a distillation token already. Choose deit_tiny_patch16_224",
        ),
        ({"global_pool": "avg", "class_token": False}, "has no class token"),
    ],
)
def test_what_cannot_have_tokens_is_refused_in_one_line(changes, says):
    with pytest.raises(ConfigError, match=says) as refusal:
        vit(**changes)
    assert "\n" not in str(refusal.value)


def test_a_network_of_another_kind_is_refused():
    with pytest.raises(ConfigError, match="resnet10t is a ResNet, and only"):
        create_model(NAME, num_classes=5, backbone="resnet10t", num_tokens=1)


def test_it_has_no_cells():
    with pytest.raises(UnsupportedError, match="vit_tiny_patch16_224"):
        check_cells(vit(), SIDE)


def test_students_with_heads_are_told_by_their_type():
    assert isinstance(vit(), HeadedStudent)
    assert not isinstance(plain_net(), HeadedStudent)


@pytest.mark.parametrize("num_tokens", [1, 2])
@pytest.mark.parametrize("name", ["soft", "hard"])
def test_tokens_learn_from_teachers_and_the_class_token_from_labels(name, num_tokens):
    stream = memory(mixed=True, num_teachers=2)
    batch, model = stream.batch(0), vit(num_tokens).eval()
    answer = model.forward_heads(images_of(stream))
    heads = answer.teachers * (2 // num_tokens)
    teachers = [rows["logits"][:, 0] for rows in batch.rows]
    each = {
        "soft": lambda z, v: formulas.kd(z, v, 2),
        "hard": lambda z, v: -formulas.own(formulas.softmax(z, 2).log(), v.argmax(-1)),
    }[name]
    terms, metrics = terms_of(settings_of(name, temperature=2, alpha=0.3), stream, model)
    taught = sum(each(z, v).mean() for z, v in zip(heads, teachers, strict=True)) / 2
    torch.testing.assert_close(terms[name].double(), 0.3 * taught, rtol=1e-5, atol=1e-6)
    label = formulas.label(answer.label_BC, batch)
    torch.testing.assert_close(terms["label"].double(), 0.7 * label, rtol=1e-5, atol=1e-6)
    right_B = answer.label_BC.argmax(-1) == formulas.larger_part(batch)
    assert metrics["top1"] == right_B.float().mean()


@pytest.mark.parametrize("name", ["soft", "hard"])
def test_no_head_is_moved_by_anothers_lesson(name):
    stream, model = memory(num_teachers=2), vit(2)
    terms, _ = terms_of(settings_of(name), stream, model)
    heads = [model.backbone.head.weight, *(head.weight for head in model.heads)]
    by_label = torch.autograd.grad(terms["label"], heads, retain_graph=True, allow_unused=True)
    by_teachers = torch.autograd.grad(terms[name], heads, allow_unused=True)
    assert [slope is not None for slope in by_label] == [True, False, False]
    assert [slope is not None for slope in by_teachers] == [False, True, True]


@pytest.mark.parametrize("name", ["ce", "kd", "dkd", "ensemble"])
def test_other_methods_train_the_mean_of_all_heads(name):
    stream, model = memory(), vit(2)
    terms, _ = terms_of(settings_of(name), stream, model)
    sum(terms.values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_student_with_tokens_becomes_a_teacher(tmp_path):
    model_args = {"backbone": "vit_tiny_patch16_224", "num_tokens": 2} | SMALL | {"img_size": 16}
    cache = record_toy(
        str(tmp_path / "cache"),
        teacher={"model": NAME, "model_args": model_args, "seed": 4, "allow_untrained": True},
        scales=[1],
        seeds="0:1",
    )
    assert list(cache.complete_seeds()) == [0]
    assert cache.spec.scales == (1,)
