"""`--push_to_hub` and its flags: what is asked for, asked of the Hub before the training, and done after it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import HubStrategy

from ...config import InputError
from ...hub import NotPushedError
from ...hub.files import check_folder_to_push
from ...hub.push import CHECK_DEADLINE, Push, check_deadline, check_repo_id, push_command, start_push
from ...trainer.hub import CheckpointPushes, checked_repository
from ...trainer.pushable import refuse_unpushable
from .running import RunStatus, from_main_process, is_main_process

# Of the Trainer's flags, those that the program follows in its place, with what they mean. The Trainer would write the
# token into training_args.bin, and push that.
HUB_FLAGS = {
    "push_to_hub": "Push model, card, results and figures to the Hub at the end. Write access is checked first.",
    "hub_model_id": "Repository, USER/NAME or NAME. Default: the name of --output_dir.",
    "hub_token": "Access token. Default, and better, since everyone sees a command line: HF_TOKEN or `hf auth login`.",
    "hub_private_repo": "Whether a new repository is private. Default: what the user, or organization, has set.",
    "hub_revision": "Branch to push to, created if there is none. Default: main.",
    "hub_strategy": "'end' (default), or 'every_save': beside the training, the model of each checkpoint too.",
    "hub_deadline": "Seconds after which a push is given up. Default: 300, and one more for each megabyte.",
}
STRATEGIES = ("end", "every_save")
# Seconds between two words of the main process to those that wait for its upload, long before any timeout.
HEARTBEAT = 5.0


@dataclass(frozen=True)
class HubArguments:
    """Where the trained model goes.

    Attributes:
        folder: that holds it.
        repo_id: "user/name", or "name" for the token's own user.
        token: if a flag gave one.
        private: whether a new repository is; None: as the user has set.
        revision: branch; None: main.
        deadline: of the upload, in seconds; None: by its size.
        every_save: also the model of each checkpoint is pushed.
    """

    folder: str
    repo_id: str
    token: str | None = field(default=None, repr=False)
    private: bool | None = None
    revision: str | None = None
    deadline: float | None = None
    every_save: bool = False

    def checked(self, trainer: Trainer) -> "HubArguments":
        """Create the repository and make sure that it may be written. Called by all processes.

        Args:
            trainer: with the model to be trained.

        Returns:
            The same, with the user's name in the id.

        Raises:
            InputError: in all of them, in seconds.
        """
        refuse_unpushable(trainer, "--push_to_hub")
        try:
            repo_id = checked_repository(
                self.repo_id,
                is_main=is_main_process(),
                token=self.token,
                private=self.private,
                deadline=min(CHECK_DEADLINE, self.deadline or CHECK_DEADLINE),
            )
        except NotPushedError as error:
            raise InputError(
                f"--push_to_hub to {self.repo_id} would fail: {error}; nothing has been trained"
            ) from error
        return replace(self, repo_id=repo_id)

    @property
    def _options(self) -> dict[str, Any]:
        names = ("token", "private", "revision", "deadline")
        return {name: getattr(self, name) for name in names}

    @contextmanager
    def checkpoints_of(self, trainer: Trainer) -> Iterator[None]:
        """In the block, with `every_save`: the model of each checkpoint is pushed, beside the training."""
        if not self.every_save:
            yield
            return
        pushes = CheckpointPushes(self.repo_id, **self._options)
        trainer.add_callback(pushes)
        try:
            yield
        finally:
            pushes.stop()

    def push(self) -> str:
        """Upload the folder; the main process does, and all return when it is done.

        Returns:
            Why it was not pushed, and how to do so later; "" if it was.
        """
        upload: Push | None = None

        def wait() -> str | None:
            """What came of the upload, or None as long as it goes on."""
            nonlocal upload
            try:
                if upload is None:
                    upload = start_push(self.folder, self.repo_id, commit_message="End of training", **self._options)
                return None if upload.wait(HEARTBEAT) is None else ""
            except (NotPushedError, InputError) as error:
                return str(error)
            except KeyboardInterrupt:
                return "interrupted"

        problem = None
        while problem is None:
            problem = from_main_process(wait)
        if not problem:
            return ""
        command = push_command(self.folder, self.repo_id, private=self.private, revision=self.revision)
        return f"trained, not pushed: {problem}. The model is in {self.folder}; push it with: {command}"


def push_at_the_end(hub: HubArguments | None, status: RunStatus) -> str:
    """Upload the folder, where that was asked for; all that is pushed is in it by now.

    Returns:
        The id of the repository; "" where nothing was pushed. `status` is told why not.
    """
    if hub is None:
        return ""
    status.not_pushed = hub.push()
    return "" if status.not_pushed else hub.repo_id


def take_hub_arguments(training: dict[str, Any], output_dir: str) -> HubArguments | None:
    """Take the flags of `--push_to_hub` out of those of the training, so that they are in no file of the Trainer.

    Args:
        training: flags by name; those of the Hub are removed.
        output_dir: what is pushed.

    Raises:
        InputError: names the flag, its value and what is allowed.
    """
    flags = {name: training.pop(name) for name in HUB_FLAGS}
    if not flags["push_to_hub"]:
        for name, value in flags.items():
            if name not in ("push_to_hub", "hub_strategy") and value is not None:
                raise InputError(f"--{name} needs --push_to_hub")
        return None
    strategy = HubStrategy(flags["hub_strategy"]).value
    if strategy not in STRATEGIES:
        raise InputError(
            f"--hub_strategy {strategy} is not supported: one of {', '.join(STRATEGIES)}; the states of optimizers "
            "stay in --output_dir"
        )
    deadline = flags["hub_deadline"]
    check_deadline("--hub_deadline", deadline)
    try:
        check_folder_to_push(output_dir)
    except InputError as error:
        raise InputError(f"--output_dir {error}") from error
    # as the Trainer would call it
    repo_id = flags["hub_model_id"] or Path(output_dir).absolute().name
    try:
        check_repo_id(repo_id)
    except InputError as error:
        raise InputError(f"--hub_model_id {error}") from error
    return HubArguments(
        output_dir,
        repo_id,
        flags["hub_token"],
        flags["hub_private_repo"],
        flags["hub_revision"],
        deadline,
        every_save=strategy == "every_save",
    )
