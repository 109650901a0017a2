"""Settings and checks: what is refused, in one line, before anything is read."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter, ValidationError
from support.steps import REQUIRED, settings_of
from support.streams import normed_net
from support.toys import NUM_CLASSES
from torch import nn

from cache_service.errors import ConfigError, UnsupportedError
from distill.methods import METHODS, MethodConfig, RunFacts, TeacherFacts, method_of

TEACHER = TeacherFacts((1, 2), NUM_CLASSES, origin="caches/a")
OTHER = TEACHER._replace(origin="caches/b")


def course(start, end):
    return {"schedule": "linear", "start": start, "end": end, "epochs": 5}


BAD = {
    "temperature": [
        True,
        0,
        -1,
        1001,
        float("nan"),
        float("inf"),
        "warm",
        course(0, 4),
        course(4, 1001),
    ],
    "share": [True, -0.1, 1.1, float("nan"), course(-0.1, 1), course(0, 1.1)],
    "final_share": [-0.1, 1.1, float("nan"), course(0, 1)],
    "weight": [True, -1, 1001, float("inf"), course(-1, 1), course(1, 1001)],
    "warmup_epochs": [-1, 100_001, course(1, 2)],
    "complementary_weight": [True, -1, 101, course(-1, 2), course(2, 101)],
    "classes": [[], [1], [1, 1], [-1, 2], [1, 2.5], [1, 2**31], "all"],
    "scales": [[], [2], [2, 1], [1, 1], [0], [1, 65], [1, 2.5]],
    "choice": ["some", None, 1],
    "flag": ["perhaps", 2],
    "correct": [0, 1, -0.5, float("nan")],
}
KINDS = {
    "ce": {},
    "kd": {"temperature": "temperature", "alpha": "share", "standardize": "flag"},
    "sd-kd": {
        "temperature": "temperature",
        "alpha": "share",
        "scales": "scales",
        "complementary_weight": "complementary_weight",
        "standardize": "flag",
    },
    "dkd": {
        "temperature": "temperature",
        "alpha": "weight",
        "beta": "weight",
        "warmup_epochs": "warmup_epochs",
        "standardize": "flag",
    },
    "sd-dkd": {
        "temperature": "temperature",
        "alpha": "weight",
        "beta": "weight",
        "warmup_epochs": "warmup_epochs",
        "scales": "scales",
        "complementary_weight": "complementary_weight",
        "standardize": "flag",
    },
    "nkd": {
        "temperature": "temperature",
        "gamma": "weight",
        "classes": "choice",
        "warmup_epochs": "warmup_epochs",
    },
    "sd-nkd": {
        "temperature": "temperature",
        "gamma": "weight",
        "classes": "choice",
        "warmup_epochs": "warmup_epochs",
        "scales": "scales",
        "complementary_weight": "complementary_weight",
    },
    "logits": {"alpha": "share"},
    "soft": {
        "temperature": "temperature",
        "alpha": "share",
        "direction": "choice",
        "heads": "choice",
        "standardize": "flag",
    },
    "hard": {"temperature": "temperature", "alpha": "share", "heads": "choice"},
    "ensemble": {
        "temperature": "temperature",
        "alpha": "share",
        "mean": "choice",
        "standardize": "flag",
    },
    "dist": {"temperature": "temperature", "beta": "weight", "gamma": "weight"},
    "tf-kd": {
        "temperature": "temperature",
        "alpha": "share",
        "form": "choice",
        "correct": "correct",
    },
    "peers": {"temperature": "temperature", "weight": "weight", "teacher_weight": "weight"},
    "ddgsd": {
        "temperature": "temperature",
        "consistency": "weight",
        "mmd": "weight",
        "teacher_temperature": "temperature",
        "teacher_weight": "weight",
    },
    "ps-kd": {"final_alpha": "final_share"},
    "cs-kd": {"temperature": "temperature", "consistency": "weight"},
    "specialist": {"classes": "classes", "temperature": "temperature", "alpha": "share"},
}


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_has_a_bound_that_is_tested(name):
    assert METHODS[name].settings.model_fields.keys() - {"name"} == KINDS[name].keys()


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        (name, field, value)
        for name, fields in KINDS.items()
        for field, kind in fields.items()
        for value in BAD[kind]
    ],
)
def test_a_bad_setting_is_refused_by_name(name, field, value):
    with pytest.raises(ValidationError, match=field) as refusal:
        TypeAdapter(MethodConfig).validate_python(
            {"name": name, **REQUIRED.get(name, {}), field: value}
        )
    places = {place for error in refusal.value.errors() for place in error["loc"]}
    assert field in places


@pytest.mark.parametrize("name", METHODS)
def test_a_typing_error_is_refused(name):
    with pytest.raises(ValidationError, match="Extra inputs"):
        TypeAdapter(MethodConfig).validate_python({"name": name, "temprature": 4})


@pytest.mark.parametrize("name", METHODS)
def test_settings_survive_being_written_down(name):
    settings = settings_of(name)
    adapter = TypeAdapter(MethodConfig)
    assert adapter.validate_python(settings.model_dump(mode="json")) == settings


def test_published_defaults():
    dkd, sd_dkd, nkd, sd_nkd = (settings_of(n) for n in ("dkd", "sd-dkd", "nkd", "sd-nkd"))
    for decoupled in (dkd, sd_dkd):
        assert (decoupled.temperature, decoupled.alpha, decoupled.beta) == (4, 1, 8)
    assert (nkd.temperature, nkd.gamma, nkd.classes) == (1, 1.5, "others")
    assert (sd_nkd.temperature, sd_nkd.gamma, sd_nkd.classes) == (4, 8, "all")
    assert {each.warmup_epochs for each in (dkd, sd_dkd, nkd, sd_nkd)} == {20}
    assert {each.complementary_weight for each in (sd_dkd, sd_nkd)} == {2}


def test_published_defaults_of_the_others():
    names = ("kd", "sd-kd", "soft", "hard", "dist", "ps-kd", "cs-kd", "peers")
    kd, sd_kd, soft, hard, dist, ps_kd, cs_kd, peers = (settings_of(name) for name in names)
    for soft_targets in (kd, sd_kd):
        assert (soft_targets.temperature, soft_targets.alpha) == (4, 0.9)
    assert (soft.temperature, soft.alpha) == (3, 0.1)
    assert (hard.temperature, hard.alpha) == (1, 0.5)
    assert (dist.temperature, dist.beta, dist.gamma) == (1, 1, 1)
    assert ps_kd.final_alpha == 0.8
    assert (cs_kd.temperature, cs_kd.consistency) == (4, 1)
    assert (peers.temperature, peers.weight) == (1, 1)


@pytest.mark.parametrize(
    ("form", "temperature", "alpha", "correct"),
    [("virtual", 20, 0.1, 0.99), ("self", 6, 0.905, None)],
)
def test_tf_kd_is_as_published_for_the_form_that_is_written(form, temperature, alpha, correct):
    settings = settings_of("tf-kd", form=form)
    found = (settings.temperature, settings.alpha, settings.correct)
    assert found == (temperature, alpha, correct)
    assert settings_of("tf-kd", form=form, alpha=0.5).alpha == 0.5
    written = TypeAdapter(MethodConfig).validate_python(settings.model_dump(mode="json"))
    assert written == settings


def test_only_a_virtual_teacher_has_a_chosen_probability():
    with pytest.raises(ValidationError, match=r"correct=0.9 with form=self"):
        settings_of("tf-kd", form="self", correct=0.9)
    with pytest.raises(ValidationError, match=r"correct=None with form=virtual"):
        settings_of("tf-kd", correct=None)


def check(settings, *, teachers=(TEACHER,), student=None):
    plan = RunFacts(tuple(teachers), student or normed_net(), NUM_CLASSES, 16)
    method_of(settings).check(settings, plan)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_accepts_one_teacher_of_the_same_classes(name):
    check(settings_of(name))


def test_labels_alone_need_no_teacher():
    check(settings_of("ce"), teachers=())


ONE = ["kd", "sd-kd", "dkd", "sd-dkd", "nkd", "sd-nkd", "logits", "dist", "specialist"]
SELF = ["ddgsd", "ps-kd", "cs-kd"]
SEVERAL = ["soft", "hard", "ensemble"]


def test_methods_are_of_four_kinds():
    assert {*ONE, *SEVERAL, *SELF, "ce", "tf-kd", "peers"} == METHODS.keys()


@pytest.mark.parametrize("name", SELF)
@pytest.mark.parametrize("teachers", [(), (TEACHER,)])
def test_self_distillation_needs_no_cache(name, teachers):
    check(settings_of(name), teachers=teachers)


@pytest.mark.parametrize("classes", [(0, NUM_CLASSES), tuple(range(NUM_CLASSES))])
def test_a_specialist_has_some_of_the_classes_and_not_all(classes):
    with pytest.raises(ConfigError, match="has some of 0 to 4, and leaves at least one out"):
        check(settings_of("specialist", classes=classes))


@pytest.mark.parametrize(
    "settings",
    [
        *map(settings_of, ONE),
        settings_of("tf-kd", form="self"),
        settings_of("peers", teacher_weight=1),
    ],
)
@pytest.mark.parametrize(
    ("teachers", "says"),
    [
        ((), "learns from a teacher, but `caches` is empty"),
        ((TEACHER, OTHER), "learns from one teacher, but `caches` names 2: caches/a, caches/b"),
        ((TEACHER._replace(num_classes=9),), "caches/a has logits for 9 classes.* student has 5"),
    ],
)
def test_methods_of_one_teacher_refuse_none_and_two_and_other_classes(settings, teachers, says):
    with pytest.raises(ConfigError, match=says):
        check(settings, teachers=teachers)


@pytest.mark.parametrize("name", SEVERAL)
def test_methods_of_several_teachers_refuse_none_and_other_classes(name):
    with pytest.raises(ConfigError, match="one teacher or several, but `caches` is empty"):
        check(settings_of(name), teachers=())
    with pytest.raises(ConfigError, match="caches/b has logits for 9 classes"):
        check(settings_of(name), teachers=(TEACHER, OTHER._replace(num_classes=9)))
    check(settings_of(name), teachers=(TEACHER, OTHER))


@pytest.mark.parametrize("name", ["tf-kd", "peers"])
@pytest.mark.parametrize("teachers", [(), (TEACHER,), (TEACHER, OTHER)])
def test_a_virtual_teacher_and_peers_need_no_cache(name, teachers):
    check(settings_of(name), teachers=teachers)


@pytest.mark.parametrize("name", ["sd-kd", "sd-dkd", "sd-nkd"])
def test_scales_that_are_not_recorded_are_refused(name):
    says = r"scales is \[1, 4\], but caches/a has scales \[1, 2\].*--set scales=\[1,2,4\]"
    with pytest.raises(ConfigError, match=says):
        check(settings_of(name, scales=(1, 4)))


class Flattened(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3 * 16 * 16, NUM_CLASSES)

    def forward(self, images_B3HW):
        return self.head(images_B3HW.flatten(1))


@pytest.mark.parametrize("name", METHODS)
def test_only_methods_on_cells_need_a_student_with_cells(name):
    if name.startswith("sd-"):
        with pytest.raises(UnsupportedError, match="Flattened"):
            check(settings_of(name), student=Flattened())
        check(settings_of(name, scales=(1,)), student=Flattened())
    else:
        check(settings_of(name), student=Flattened())


TOPK = TEACHER._replace(drops_classes=True)
STANDARDIZED = ["kd", "sd-kd", "dkd", "sd-dkd", "soft", "ensemble"]


@pytest.mark.parametrize("name", sorted(METHODS.keys() - STANDARDIZED))
def test_what_compares_no_softmax_of_both_sides_cannot_be_standardized(name):
    with pytest.raises(ValidationError, match="standardize\n  Extra inputs"):
        settings_of(name, standardize=True)


@pytest.mark.parametrize(
    "settings",
    [
        settings_of("logits"),
        *(settings_of(name, standardize=True) for name in STANDARDIZED),
    ],
    ids=lambda settings: settings.name,
)
def test_what_needs_every_logit_refuses_caches_that_dropped_some(settings):
    says = rf"method {settings.name} .*caches/a keeps only the largest .*codec.kind=int8"
    with pytest.raises(UnsupportedError, match=says):
        check(settings, teachers=[TOPK])
    check(settings, teachers=[TEACHER._replace(drops_classes=False)])


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"logits"}))
def test_all_others_take_what_is_left(name):
    check(settings_of(name), teachers=[TOPK])
