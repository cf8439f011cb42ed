"""What a training has to do with the Hub: access checked before it, pushes of checkpoints beside it."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from ..config import InputError
from ..hub import NotPushedError, check_write_access, files_to_push
from ..hub.push import CHECK_DEADLINE, Push, check_repo_id, start_push
from .pushable import refuse_other_form, refuse_unpushable

logger = logging.get_logger(__name__)

# In the output folder: what is being uploaded, under further names, so that old checkpoints may be removed meanwhile.
UPLOADING = ".uploading"


def checked_repository(
    repo_id: str, *, is_main: bool, token: str | None, private: bool | None, deadline: float
) -> str:
    """`check_write_access` by the main process, before a training; all processes call it.

    Returns:
        The id with the user's name.

    Raises:
        InputError: no repository can have such a name.
        NotPushedError: in all of them.
    """
    check_repo_id(repo_id)
    problem = ""
    if is_main:
        try:
            repo_id = check_write_access(repo_id, token, private=private, deadline=deadline)
        except NotPushedError as error:
            problem = str(error)
    repo_id, problem = broadcast_object_list([repo_id, problem])
    if problem:
        raise NotPushedError(problem)
    return repo_id


def init_repository(trainer: Any, token: str | None, private: bool | None) -> None:
    """In the place of `Trainer.init_hf_repo`, with the Trainer's own arguments. All processes call it."""
    args = trainer.args
    refuse_unpushable(trainer, "push_to_hub=True")
    refuse_other_form(trainer, "push_to_hub=True")
    repo_id = args.hub_model_id or Path(args.output_dir).absolute().name
    try:
        trainer.hub_model_id = checked_repository(
            repo_id,
            is_main=trainer.is_world_process_zero(),
            token=token or args.hub_token,
            private=args.hub_private_repo if private is None else private,
            deadline=CHECK_DEADLINE,
        )
    except NotPushedError as error:
        raise NotPushedError(f"push_to_hub=True: a push to {repo_id} would fail: {error}") from error
    trainer.push_in_progress = None


@contextmanager
def token_left_out(args: Any) -> Iterator[None]:
    """In the block, the arguments of a training hold no token: they are pickled into `training_args.bin`."""
    token, args.hub_token = args.hub_token, None
    try:
        yield
    finally:
        args.hub_token = token


class CheckpointPushes(TrainerCallback):
    """Pushes the model of each checkpoint, one at a time; what is saved during an upload is not pushed.

    As the Trainer does, but for optimizer states, `training_args.bin` and failures: those are warned of. The training
    never waits, and never fails.

    Args:
        repo_id: of a repository that exists.
        **options: of `start_push`.
    """

    def __init__(self, repo_id: str, **options: Any) -> None:
        self.repo_id, self.options = repo_id, options
        self._push: Push | None = None
        self._name, self._folder = "", Path()

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.start(Path(args.output_dir or "", f"checkpoint-{state.global_step}"))

    def start(self, checkpoint: str | Path) -> None:
        """Begin to push a checkpoint, unless another is on its way."""
        if not self.is_done():
            return
        checkpoint = Path(checkpoint)
        self._name, self._folder = checkpoint.name, checkpoint.parent / UPLOADING
        message = f"Training in progress, {checkpoint.name.replace('checkpoint-', 'step ')}"
        try:
            shutil.rmtree(self._folder, ignore_errors=True)
            for name in files_to_push(checkpoint):
                (self._folder / name).parent.mkdir(parents=True, exist_ok=True)
                _link(checkpoint / name, self._folder / name)
            self._push = start_push(self._folder, self.repo_id, commit_message=message, **self.options)
        except InputError as error:
            self._end(str(error))

    def is_done(self) -> bool:
        """Whether nothing is on its way; warns of what has failed."""
        self._wait(0)
        return self._push is None

    def wait_until_done(self) -> None:
        self._wait(None)

    def stop(self) -> None:
        """End an upload that goes on: what follows replaces it."""
        if not self.is_done() and self._push is not None:
            self._push.kill()
            self._end("")

    def _wait(self, seconds: float | None) -> None:
        if self._push is None:
            return
        try:
            if self._push.wait(seconds) is not None:
                self._end("")
        except NotPushedError as error:
            self._end(str(error))

    def _end(self, problem: str) -> None:
        if problem:
            logger.warning(f"{self._name} was not pushed: {problem}. The training goes on")
        self._push = None
        shutil.rmtree(self._folder, ignore_errors=True)


def push_checkpoint(trainer: Any, checkpoint: str) -> None:
    """In the place of `Trainer._push_from_checkpoint`, with the Trainer's own arguments."""
    args = trainer.args
    if not trainer.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
        return
    if args.hub_strategy != HubStrategy.EVERY_SAVE:
        logger.warning_once(
            f"hub_strategy={args.hub_strategy.value!r}: models are pushed, states of optimizers are not"
        )
    trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
    if trainer.push_in_progress is None:
        trainer.push_in_progress = CheckpointPushes(
            trainer.hub_model_id, token=args.hub_token, private=args.hub_private_repo, revision=args.hub_revision
        )
    trainer.push_in_progress.start(checkpoint)


def _link(source: Path, target: Path) -> None:
    """A second name for a file; a copy where the disk knows no such."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
