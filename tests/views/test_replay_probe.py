"""A user's pipeline that does not give the same views again is refused, and what it keeps named.

The new process takes seconds, so most pipelines here are refused before it is started.
"""

from __future__ import annotations

import numpy as np
import pytest
from support import stateful
from support.toys import Patches

from cache_service.datasets import wrap_dataset
from cache_service.errors import ConfigError, UnsupportedError
from cache_service.format.recipe import AugmentConfig
from cache_service.views import replay_probe
from cache_service.views.pipeline_state import generator_states, kept_state
from cache_service.views.replay import Views
from cache_service.views.replay_probe import require_replayable


@pytest.fixture(scope="module")
def images():
    return wrap_dataset(Patches(40, side=30))


@pytest.fixture
def views(images):
    def make(name):
        config = AugmentConfig(size=24, callable=f"support.stateful:{name}")
        return Views(config.recipe(), images)

    return make


@pytest.fixture
def in_this_process(monkeypatch):
    """Leaves the new process out, where only the passes in this one are meant."""

    def render(path, size, images, params_B1):
        renderer = replay_probe.SeededPipeline(path, size)
        order = range(len(images))
        digests = replay_probe._Pass(renderer, images, params_B1, order).digests
        return [digests[n] for n in order]

    monkeypatch.setattr(replay_probe, "_render_elsewhere", render)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("numpy_closure", r"<lambda>\.generator \(numpy Generator\).*set_random_seed"),
        ("numpy_global", r"stateful\.py:SHARED \(numpy Generator\)"),
        ("legacy_numpy", r"<lambda>\.generator \(numpy RandomState\)"),
        ("python_closure", r"<lambda>\.generator \(random Random\)"),
        ("torch_closure", r"<lambda>\.generator \(torch Generator\)"),
        ("of_class", r"OfClass\.generator \(random Random\)"),
        ("rare", r"the same 16 views left its random generators in other states"),
        ("counter", r"16 of the same 16 views .* Slots\.calls \(int\).*keep nothing"),
        ("iterator", r"<lambda>\.count \(itertools count\)"),
        ("generator_function", r"It keeps state between calls: <lambda>\.steps \(generator\)"),
        ("buffer", r"Buffer\.previous \(numpy ndarray\)"),
        ("of_type", r"OfType\.calls \(int\)"),
        ("unseeded", r"Nothing that it keeps was found to change"),
        ("entropy", r"Nothing that it keeps was found to change"),
        ("clock", r"Nothing that it keeps was found to change, so it may use the time"),
    ],
)
def test_what_a_pipeline_keeps_between_calls_is_named(views, name, says):
    with pytest.raises(UnsupportedError, match=rf"support\.stateful:{name}.*{says}") as refusal:
        require_replayable(views(name), 0)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["reseeded", "remembers", "paints", "lazy"])
def test_generators_that_are_seeded_or_unused_are_no_reason_to_refuse(views, name, in_this_process):
    require_replayable(views(name), 0)


@pytest.mark.parametrize("name", ["hashed", "cached_choice"])
def test_what_differs_in_a_new_process_is_refused(views, name):
    with pytest.raises(UnsupportedError, match=r"rendered in a new process, 16 .* order of a set"):
        require_replayable(views(name), 0)


def test_a_pipeline_that_ends_the_new_process_is_refused(views):
    with pytest.raises(UnsupportedError, match=r"ended a new process.*\(status 9\)"):
        require_replayable(views("ends"), 0)


def test_declared_ops_are_not_tried(images, monkeypatch):
    monkeypatch.setattr(images, "image", lambda sample: 1 / 0)
    require_replayable(Views(AugmentConfig(size=16, preset="cifar").recipe(), images), 0)


def test_large_images_mean_fewer_probes(images, monkeypatch):
    monkeypatch.setattr(replay_probe, "MAX_PROBE_BYTES", 5 * 30 * 30 * 3)
    assert len(list(replay_probe._up_to(5 * 2700, (images.image(n) for n in range(16))))) == 5
    assert len(list(replay_probe._up_to(0, (images.image(n) for n in range(16))))) == 2


def test_an_error_of_a_pipeline_is_one_line_with_sample_and_place(views):
    with pytest.raises(
        ConfigError, match=r"sample \d+: .*KeyError: 'id' \(stateful\.py, line \d+\)"
    ):
        views("raises").render(0, [0])
    with pytest.raises(ConfigError, match=r"IndexError: list index .* \(stateful\.py, line \d+\)"):
        views("does_not_open")


def test_a_deep_or_circular_pipeline_is_looked_through_once():
    here: dict = {}
    here["self"] = here
    here["list"] = [here, [stateful.random.Random(1)]]
    assert list(generator_states(here)) == ["dict['list'][1][0]"]
    nested: list = []
    for _ in range(50_000):
        nested = [nested]
    assert next(iter(kept_state(nested))) == "len(list)"


def test_a_large_array_is_sampled_and_still_told_from_another():
    one, other = np.zeros(10_000_000, np.uint8), np.zeros(10_000_000, np.uint8)
    other[:5_000_000] = 1
    assert kept_state([one])["list[0]"][1] != kept_state([other])["list[0]"][1]


def test_the_global_generators_are_no_state_of_a_pipeline():
    def uses_globals(image):
        return stateful.random.random() + stateful.np.random.rand()

    assert not generator_states(uses_globals)
