"""The files of checkpoints: in a directory, in the hub's copy on this machine, or downloaded."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import constants, list_repo_files, snapshot_download
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from lowrank_tune.errors import InputError
from lowrank_tune.features.recognised import missing_file, no_checkpoint, not_a_folder
from lowrank_tune.features.tiny import TINY_RANDOM, write_tiny_checkpoint

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
_HUB_PAGE = re.compile(r"^https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([^/]+/[^/?#]+)")


def is_local(name: str) -> bool:
    return os.path.isdir(os.path.expanduser(name))


def fetch_files(
    name: str,
    cache_root: Path,
    revision: str | None,
    needed: Sequence[str],
    one_of: Sequence[str] = (),
    more: Sequence[str] = (),
) -> Path:
    """The folder that holds these files of a checkpoint; what only the hub has is downloaded.

    It holds one or none of `one_of`, and of `more` what there is.
    """
    tiny = name == TINY_RANDOM
    if tiny or is_local(name):
        directory = write_tiny_checkpoint(cache_root / "checkpoints") if tiny else Path(os.path.expanduser(name))
        for file in needed:
            if not os.path.isfile(directory / file):
                known = file in (CONFIG, SINGLE)
                raise InputError(no_checkpoint(directory, file) if known else missing_file(directory, file, INDEX))
        return directory
    if os.path.exists(os.path.expanduser(name)):
        raise InputError(f"features.encoder.checkpoint: {not_a_folder(Path(os.path.expanduser(name)))}")
    if not _HUB_ID.match(name):
        page = _HUB_PAGE.match(name)
        close = difflib.get_close_matches(name, [TINY_RANDOM])
        hint = f" (write {page[1]})" if page else " (did you mean tiny-random?)" if close else ""
        raise InputError(
            f"features.encoder.checkpoint: {name} is neither a directory nor a hub id such as "
            f"Qwen/Qwen2.5-VL-3B-Instruct{hint}; there is no {Path(name).absolute()}"
        )
    return _download(name, revision, needed, one_of, more)


def _download(
    name: str, revision: str | None, needed: Sequence[str], one_of: Sequence[str], more: Sequence[str]
) -> Path:
    """The hub's copy on this machine; without a revision the one that is here, before the newest one is asked for."""
    here, problem, listed = None, "", list[str]()
    for offline in (True, False):
        try:
            patterns = [*needed, *one_of, *more]
            options: dict[str, Any] = {"revision": revision, "allow_patterns": patterns, "local_files_only": offline}
            directory = Path(snapshot_download(name, **options))
        except LocalEntryNotFoundError:
            asked = "HF_HUB_OFFLINE forbids to ask the hub" if constants.HF_HUB_OFFLINE else "the hub does not answer"
            problem = f"not on this machine and {asked}"
        except RepositoryNotFoundError as error:  # or one that this user may not read
            closed = "is only for those who have accepted its terms: accept them on its page"
            gone = f"is not on the hub, or private, and there is no folder {Path(name).absolute()}: correct its name"
            found = closed if isinstance(error, GatedRepoError) else gone
            raise InputError(f"{name}: {found}, or log in by `hf auth login`") from error
        except (OSError, ValueError) as error:
            problem = f"not to be downloaded ({' '.join(str(error).split()) or type(error).__name__})"
        else:
            complete = all((directory / file).is_file() for file in needed)
            if complete and (not one_of or not offline or any((directory / file).is_file() for file in one_of)):
                return directory
            here = directory if complete or not offline else here
            problem = "not on this machine, and the hub has no such file there or does not answer"
    if here is not None and all((here / file).is_file() for file in needed):
        return here
    if here is not None and needed in ([CONFIG], [SINGLE]):
        with contextlib.suppress(OSError, ValueError):
            listed = list_repo_files(name, revision=revision)
        if found := no_checkpoint(here, needed[0], name, listed):
            raise InputError(found)
    what = f"{', '.join(needed)} is " if needed else "it is "
    folder = "" if name.startswith("Qwen/") else f"; no folder {Path(name).absolute()} is there either"
    raise InputError(
        f"{name}: {what}{problem}{folder}; download it where there is a network (`hf download {name}`) and give the "
        "directory, name another safetensors Qwen2.5-VL checkpoint, or use `checkpoint: tiny-random`"
    )
