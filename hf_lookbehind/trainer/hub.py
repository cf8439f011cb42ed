"""What a training has to do with the Hub: access checked before it, pushes beside it and at its end."""

# The Trainer annotates as optional what it sets before training, and its own overrides differ in their signatures.
# pyright: reportOptionalMemberAccess=false, reportArgumentType=false, reportIncompatibleMethodOverride=false, reportAttributeAccessIssue=false

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from huggingface_hub import CommitInfo, HfApi
from transformers import TrainerCallback
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from ..config import InputError
from ..hub import NotPushedError, check_write_access, files_to_push
from ..hub.push import CHECK_DEADLINE, Push, check_repo_id, push_command, push_folder, start_push
from .base import MixinBase
from .card import write_trainer_card
from .pushable import refuse_other_form, refuse_unpushable

logger = logging.get_logger(__name__)

# In the output folder: what is being uploaded, under further names, so that old checkpoints may be removed meanwhile.
UPLOADING = ".uploading"


class HubMixin(MixinBase):
    """Cards and pushes: a model's files alone are shared, each push within a deadline."""

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """`Trainer.init_hf_repo`, called at construction with `push_to_hub=True`: write access is checked too.

        Raises:
            NotPushedError: in all processes, in half a minute at most.
        """
        args = self.args
        refuse_unpushable(self, "push_to_hub=True")
        refuse_other_form(self, "push_to_hub=True")
        repo_id = args.hub_model_id or Path(args.output_dir).absolute().name
        try:
            self.hub_model_id = checked_repository(
                repo_id,
                is_main=self.is_world_process_zero(),
                token=token or args.hub_token,
                private=args.hub_private_repo if private is None else private,
                deadline=CHECK_DEADLINE,
            )
        except NotPushedError as error:
            raise NotPushedError(f"push_to_hub=True: a push to {repo_id} would fail: {error}") from error
        self.push_in_progress = None

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """A card of the model, with what the method did; a card that the user wrote is kept beside it."""
        write_trainer_card(self, super().create_model_card, *args, **kwargs)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """`Trainer.push_to_hub` by `hf_lookbehind.hub.push_folder`: all is on disk before the Hub is asked.

        Raises:
            InputError: the model or its folder cannot be pushed, see `refuse_unpushable` and `push_folder`.
            NotPushedError: the Hub cannot be reached, refuses, or does not answer in time; the model is in the folder.
        """
        args = self.args
        refuse_unpushable(self, "push_to_hub()")
        self.callback_handler.on_push_begin(args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        repo_id = self.hub_model_id or args.hub_model_id or Path(args.output_dir).absolute().name
        tags = kwargs.get("tags") or []
        tags = [*([tags] if isinstance(tags, str) else tags), *(getattr(self.model, "model_tags", None) or ())]
        self.create_model_card(**{"model_name": repo_id.split("/")[-1], **kwargs, **({"tags": tags} if tags else {})})
        private, revision = args.hub_private_repo if private is None else private, revision or args.hub_revision

        def upload() -> CommitInfo:
            try:
                return push_folder(
                    args.output_dir,
                    repo_id,
                    token=token or args.hub_token,
                    private=private,
                    revision=revision,
                    commit_message=commit_message or "End of training",
                )
            except NotPushedError as error:
                later = push_command(args.output_dir, repo_id, private=private, revision=revision)
                raise NotPushedError(f"{error}. The model is in {args.output_dir}; push it with: {later}") from error

        return upload() if blocking else HfApi().run_as_future(upload)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        args = self.args
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        if args.hub_strategy != HubStrategy.EVERY_SAVE:
            logger.warning_once(
                f"hub_strategy={args.hub_strategy.value!r}: models are pushed, states of optimizers are not"
            )
        self.callback_handler.on_push_begin(args, self.state, self.control)
        if self.push_in_progress is None:
            self.push_in_progress = CheckpointPushes(
                self.hub_model_id, token=args.hub_token, private=args.hub_private_repo, revision=args.hub_revision
            )
        self.push_in_progress.start(checkpoint_folder)

    def _save(self, *args: Any, **kwargs: Any) -> None:
        with token_left_out(self.args):
            super()._save(*args, **kwargs)


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


def _link(source: Path, target: Path) -> None:
    """A second name for a file; a copy where the disk knows no such."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
