"""Small models, shared by all tests, without downloads."""

import functools
import gc
import json
import logging
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also in the programs that tests start: tiny models are slower with more threads

import pytest
from hypothesis import settings

gc.disable()  # until all is imported: looking through what stays costs a fifth of the imports' time
settings.register_profile("any host", deadline=None)
settings.load_profile("any host")


def pytest_sessionstart(session):
    """Prepare the libraries, except in the process that only hands out tests: it starts the others before they can import."""
    if session.config.getoption("numprocesses", None) and not hasattr(session.config, "workerinput"):
        return
    import accelerate
    import torch

    torch.set_num_threads(1)
    # A PeftModel calls it in every forward pass, 4 ms each.
    accelerate.utils.imports._is_package_available = functools.cache(accelerate.utils.imports._is_package_available)


@pytest.fixture(scope="session")
def processor():
    from support import TEXTS

    from mpo.models.small import small_processor

    return small_processor(TEXTS, image_size=32, patch_size=8, max_patches=4)


@pytest.fixture
def internvl(processor):
    from mpo.models.small import small_internvl

    return small_internvl(processor, hidden_size=32, layers=2, vision_hidden_size=32, vision_layers=2)


@pytest.fixture(scope="session")
def pairs_of_images():
    from support import image_pairs

    return image_pairs(8)


@pytest.fixture(scope="session")
def pairs_of_text():
    from support import text_pairs

    return text_pairs(8)


@pytest.fixture(scope="session")
def interpreter():
    """An executable in the place of `sys.executable` whose programs begin with everything imported."""
    from zygote import forking_python

    with forking_python() as path:
        yield path


@pytest.fixture(autouse=True)
def _root_logger():
    """Take back what Hydra sets up for a job: its lines go to the stream that its test captured."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.setLevel(level)
    for handler in root.handlers[:]:
        if handler not in handlers and type(handler) in (logging.StreamHandler, logging.FileHandler):
            root.removeHandler(handler)


def pytest_collection_modifyitems(config, items):
    """Several workers begin with the files that have slow tests, so that none is left with one at the end."""
    if hasattr(config, "workerinput"):
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish():
    """Freeze the objects of the imports: every `train()` collects garbage. Looking for theirs would take a second."""
    gc.freeze()
    gc.enable()


def pytest_terminal_summary(terminalreporter):
    """Print the measured differences between runs that must be equal."""
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.getreports(outcome)]
    largest = {}
    for what, value in (value for report in reports for name, value in report.user_properties if name == "difference"):
        largest[what] = max(value, largest.get(what, value))
    if largest:
        terminalreporter.section("largest differences")
        for what, value in largest.items():
            terminalreporter.write_line(f"{what:<60} {value:.1e}")


@pytest.fixture
def files(processor, internvl, tmp_path):
    """A small model and four pairs on disk."""
    from support import make_image

    internvl.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    make_image(0).save(tmp_path / "a.png")
    line = {"image": "a.png", "question": "What is it?", "chosen": "A cat.", "rejected": "A dog."}
    (tmp_path / "pairs.jsonl").write_text("\n".join([json.dumps(line)] * 4))
    return tmp_path
