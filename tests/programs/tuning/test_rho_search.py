"""`--rho_search`: what is kept of a search that is cut short, who decides in several processes, what is let go of."""

import json
import os
import signal
import weakref
from contextlib import contextmanager

import pytest
import torch
from transformers import default_data_collator

from hf_lookbehind import InputError, LookbehindTrainer
from hf_lookbehind.programs.cli.flags import FlagParser
from hf_lookbehind.programs.cli.running import Preempted, RunStatus
from hf_lookbehind.programs.evaluation import Metrics
from hf_lookbehind.programs.task import Task
from hf_lookbehind.programs.tuning.rho_search import RhoSearch
from tests.processes import run_group
from tests.training import images, make_model

RADII = ["0.01", "0.02", "0.05"]
FLAGS = ["--k", "1", "--max_steps", "2", "--report_to", "none", "--disable_tqdm", "true"]


def make_task(validation=8):
    data = {"train": images(16), "validation": images(validation)}
    return Task(data, make_model, None, lambda model: default_data_collator, Metrics(lambda _: {}, []))


def searched(folder, *flags, task=None):
    """A search, and the radii of the trainings that it took."""
    trained = []

    class Counted(LookbehindTrainer):
        def train(self, *args, **kwargs):
            trained.append(self.lookbehind_config.rho)
            return super().train(*args, **kwargs)

    os.makedirs(folder, exist_ok=True)
    task = task or make_task()
    object.__setattr__(task, "trainer_class", Counted)
    search = RhoSearch(FlagParser().parse(["--output_dir", str(folder), *FLAGS, "--rho_search", *RADII, *flags]), task)
    search.run()
    return search, trained


@contextmanager
def ended_in_training(number, how, monkeypatch):
    """In the block the search's training of a number (from 1) ends by what `how` does."""
    calls, train = [], LookbehindTrainer.train

    def end(self, *args, **kwargs):
        calls.append(1)
        return how() if len(calls) == number else train(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(LookbehindTrainer, "train", end)
        yield


def interrupt():
    raise KeyboardInterrupt


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    search, trained = searched(tmp_path_factory.mktemp("whole"))
    assert trained == [0.01, 0.02, 0.05]
    return search


@pytest.mark.filterwarnings("ignore:the best settings lie on the edge")
@pytest.mark.parametrize("how, ends_with", [(interrupt, KeyboardInterrupt), (terminate, Preempted)])
def test_a_search_that_was_cut_short_goes_on_after_its_finished_trainings(
    tmp_path, monkeypatch, whole, how, ends_with
):
    before = signal.getsignal(signal.SIGTERM)
    with ended_in_training(3, how, monkeypatch), pytest.raises(ends_with):
        searched(tmp_path, "--enable_jit_checkpoint")
    assert signal.getsignal(signal.SIGTERM) == before
    assert json.loads((tmp_path / "rho_search.json").read_text())["result"] is None
    search, trained = searched(tmp_path, "--enable_jit_checkpoint")
    assert trained == [0.05] and search.result == whole.result
    # also when the training after it ended before its first checkpoint
    assert searched(tmp_path, "--enable_jit_checkpoint")[1] == []


@pytest.mark.filterwarnings("ignore:the best settings lie on the edge")
def test_what_a_search_has_found_serves_the_same_flags_and_data_only(tmp_path, monkeypatch):
    with ended_in_training(3, interrupt, monkeypatch), pytest.raises(KeyboardInterrupt):
        searched(tmp_path)
    assert searched(tmp_path, "--rho_search", "0.01", "0.1")[1] == [0.1]
    for flags, task in ([["--learning_rate", "1e-3"], None], [[], make_task(validation=9)]):
        with pytest.raises(InputError, match=r"rho_search.json holds a search with other flags or data"):
            searched(tmp_path, *flags, task=task)
    status = RunStatus(tmp_path)
    status.start()
    status.done()  # what follows a run that is over is another run
    assert searched(tmp_path, "--learning_rate", "1e-3")[1] == [0.01, 0.02, 0.05]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace('"best"', '"worst"'),
        lambda text: text.replace('"scores": [', '"scores": [], "x": ['),
        lambda text: text.replace('"rho": 0.01', '"rho": "large"'),
    ],
)
def test_a_damaged_file_is_named_in_one_line(tmp_path, whole, damage):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "trainer_state.json").write_text("{}")
    (tmp_path / "rho_search.json").write_text(damage(whole.path.read_text()))
    with pytest.raises(InputError) as refused:
        searched(tmp_path, "--resume_from_checkpoint", "last")
    assert f"{tmp_path}/rho_search.json is damaged" in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.filterwarnings("ignore:the best settings lie on the edge")
def test_no_number_of_a_search_is_one_that_json_does_not_have(tmp_path):
    task = make_task()
    object.__setattr__(task, "metrics", Metrics(lambda _: {"perplexity": float("inf")}, ["perplexity"]))
    with pytest.raises(InputError, match="every training diverged"):
        searched(tmp_path, task=task)
    assert "Infinity" not in (tmp_path / "rho_search.json").read_text()


@pytest.mark.filterwarnings("ignore:the best settings lie on the edge")
def test_a_radius_at_which_most_steps_were_skipped_never_wins(tmp_path):
    task = make_task()
    # untrained models are the best
    scores = iter([1.0, 0.5])
    object.__setattr__(task, "metrics", Metrics(lambda _: {"accuracy": next(scores)}, ["accuracy"]))
    search, trained = searched(tmp_path, "--rho_search", "1e30", "0.01", task=task)
    assert trained == [1e30, 0.01] and search.result.best["rho"] == 0.01
    with pytest.raises(InputError, match="every training diverged, or skipped most of its steps"):
        object.__setattr__(task, "metrics", Metrics(lambda _: {"accuracy": 1.0}, ["accuracy"]))
        searched(tmp_path / "again", "--rho_search", "1e30", "1e29", task=task)


@pytest.mark.filterwarnings("ignore:the best settings lie on the edge")
def test_each_model_is_gone_before_the_next_is_made(tmp_path):
    task, made, alive = make_task(), [], []

    def load_model():
        alive.append(sum(model() is not None for model in made))
        model = make_model()
        made.append(weakref.ref(model))
        return model

    object.__setattr__(task, "load_model", load_model)
    searched(tmp_path, "--bf16", task=task)  # with autocast a model refers to itself
    assert alive == [0, 0, 0]


# ---- two processes that share no disk ----


def searches_apart(folder):
    """What a process finds in each of some searches, for which the disk of one process holds what is left of another.

    Its result and trainings, or why it was refused, and whether it has written.
    """
    torch.set_num_threads(1)
    rank, outcomes = os.environ["RANK"], []
    for left, rank_of_disk in (("unfinished", "0"), ("damaged", "1"), ("in the way", "0")):
        own = os.path.join(folder, left if rank == rank_of_disk else f"{left} {rank}")
        try:
            search, trained = searched(own)
        except InputError as error:
            outcomes.append(str(error))
            continue
        outcomes.append((search.result.best, trained, os.path.exists(f"{own}/rho_search.json")))
    return outcomes


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the best settings lie on the edge")
def test_the_main_process_decides_what_is_left_of_a_search(tmp_path, monkeypatch):
    with ended_in_training(3, interrupt, monkeypatch), pytest.raises(KeyboardInterrupt):
        searched(tmp_path / "unfinished")
    for name in ("damaged", "in the way"):
        (tmp_path / name / "rho_search_trials" / "mine").mkdir(parents=True)
        (tmp_path / name / "rho_search.json").write_text("{")
    (*first, refused), (*second, refused_too) = run_group(searches_apart, tmp_path)
    assert [outcome[1:] for outcome in first] == [([0.05], True), ([0.01, 0.02, 0.05], True)]
    assert [outcome[1:] for outcome in second] == [([0.05], False), ([0.01, 0.02, 0.05], True)]
    assert [outcome[0] for outcome in first] == [outcome[0] for outcome in second]
    assert refused == refused_too and refused.startswith(f"{tmp_path / 'in the way'}/rho_search_trials is in the way")
