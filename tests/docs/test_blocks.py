"""Every YAML and Python block of a page is one that works."""

from __future__ import annotations

import ast
import importlib
import re

import pytest
import timm
from PIL import Image
from support.pages import ROOT, blocks, blocks_of

from cache_service.api.builds.request import BuildRequest, build_config
from cache_service.api.http.settings import ServeConfig, load_serve_config
from cache_service.config import load_yaml_config, parse_yaml, validate_config
from cache_service.datasets import DatasetConfig, open_dataset
from cache_service.models.zoo import CIFAR_NAMES  # noqa: F401  timm knows them by this
from cache_service.plugins import load_object
from cache_service.recording.build_config import BuildConfig
from cli.experiments.cycle import CycleConfig
from cli.experiments.experiment_file import ExperimentConfig
from distill.config import TrainConfig
from distill.multi_student import split_students

PACKAGES = ("cache_service", "distill", "cli")

COMPLETE = {
    BuildConfig: {"cache", "dataset", "augment", "teacher", "seeds"},
    TrainConfig: {"dataset", "student", "method", "optimizer", "epochs", "batch_size", "out"},
}

BASE = {
    BuildConfig: ROOT / "examples" / "cifar100.build.yaml",
    TrainConfig: ROOT / "examples" / "cifar100.train.yaml",
}


def validate(document, where):
    """As a whole file where every required key is there, else as a part of one."""
    if "students" in document and "methods" not in document:
        base = parse_yaml(BASE[TrainConfig].read_text(), where=where)
        return split_students(base | document, where=where)
    for model, required in COMPLETE.items():
        if required <= document.keys():
            return validate_config(model, document, where=where)
    if "methods" in document and "students" in document:
        return validate_config(ExperimentConfig, document, where=where)
    if "rounds" in document:
        return validate_config(CycleConfig, document, where=where)
    if document.keys() <= ServeConfig.model_fields.keys():
        return validate_config(ServeConfig, {"root": "caches"} | document, where=where)
    model = next(m for m in COMPLETE if document.keys() <= m.model_fields.keys())
    base = parse_yaml(BASE[model].read_text(), where=where)
    return validate_config(model, base | document, where=where)


RESULTS = "docs/results/"
"""What `reproduce` and `experiment` wrote: blocks that say what was run, on which machine."""


@pytest.mark.parametrize(
    "block", [each for each in blocks("yaml") if not str(each).startswith(RESULTS)], ids=str
)
def test_a_yaml_block_is_a_build_or_train_file_or_a_part_of_one(block):
    validate(parse_yaml(block.text, where=str(block)), str(block))


@pytest.mark.parametrize("file", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda f: f.name)
def test_an_example_is_a_valid_file(file):
    if ".serve." in file.name:
        assert load_serve_config("caches", file).builds is not None
        return
    kinds = {
        ".build.": BuildConfig,
        ".cycle.": CycleConfig,
        ".experiment.": ExperimentConfig,
    }
    model = next((kinds[part] for part in kinds if part in file.name), TrainConfig)
    load_yaml_config(model, file)


@pytest.mark.parametrize("file", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda f: f.name)
def test_an_example_names_networks_that_there_are(file):
    for name in re.findall(r"\bmodel: ([\w.:/-]+)", file.read_text()):
        # `module:factory` names a class of the user's.
        assert ":" in name or timm.is_model(name.partition(".")[0]), name


def test_the_example_request_is_one_that_the_example_service_takes():
    builds = load_serve_config("caches", ROOT / "examples" / "digits.serve.yaml").builds
    asked = (ROOT / "examples" / "digits.request.json").read_text()
    config = build_config(
        BuildRequest.model_validate_json(asked), builds, cache_url="caches/new", device="cpu"
    )
    assert config.dataset.name == "digits"


@pytest.mark.parametrize(
    ("page", "count"),
    [("README.md", 2), ("docs/cookbook.md", 2), ("docs/serving.md", 1), ("docs/experiments.md", 1)],
)
def test_a_page_shows_the_examples_as_they_are(page, count):
    shown = re.findall(
        r"<!-- same as: (\S+\.yaml) -->\n```yaml\n(.*?)```",
        (ROOT / page).read_text(),
        re.DOTALL,
    )
    assert len(shown) == count
    for path, text in shown:
        assert text == (ROOT / path).read_text(), path


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_a_python_block_compiles_and_imports_what_is_there(block):
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] in PACKAGES:
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{block}: {node.module}.{alias.name}"


@pytest.mark.parametrize(
    ("page", "count"), [("README.md", 1), ("docs/loops.md", 5)], ids=["README", "loops"]
)
def test_a_page_shows_a_part_of_the_loop_that_the_example_runs(page, count):
    shown = re.findall(
        r"<!-- part of: (\S+\.py) -->\n```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL
    )
    assert len(shown) == count
    for path, text in shown:
        example = [line.strip() for line in (ROOT / path).read_text().splitlines()]
        # The README begins with what stands elsewhere in the example: a cache and a dataset.
        start = text.index("for epoch in") if page == "README.md" else 0
        lines = [line.strip() for line in text[start:].splitlines()]
        at = example.index(lines[0])
        assert example[at : at + len(lines)] == lines, path


def saved(tmp_path, page, containing):
    """The Python block with these words, as a file."""
    (block,) = [
        b for b in blocks_of(ROOT / page) if b.language == "python" and containing in b.text
    ]
    file = tmp_path / "block.py"
    file.write_text(block.text)
    return file


def test_the_method_that_the_page_adds_is_a_method(tmp_path):
    (method,) = load_object(f"{saved(tmp_path, 'docs/methods.md', 'METHODS =')}:METHODS")
    assert method.name == "match"
    assert method.settings().weight == 1.0


def test_the_pipeline_that_the_page_writes_makes_views(tmp_path):
    pipeline = load_object(f"{saved(tmp_path, 'docs/augmentation.md', 'pipeline')}:pipeline")()
    assert pipeline(Image.new("RGB", (32, 32))).size == (32, 32)


def test_the_dataset_that_the_page_writes_opens(tmp_path):
    for number in range(3):
        Image.new("RGB", (8, 8), (number * 80, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "fold3.txt").write_text("0.png 0\n1.png 1\n2.png 2\n")
    name = f"{saved(tmp_path, 'docs/cookbook.md', 'class Flowers')}:open_flowers"
    dataset = open_dataset(DatasetConfig(name=name, root=str(tmp_path), args={"fold": 3}))
    assert dataset.labels.tolist() == [0, 1, 2]
    assert dataset.image(2).getpixel((0, 0)) == (160, 0, 0)
