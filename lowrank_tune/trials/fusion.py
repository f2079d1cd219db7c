"""Which trials gain by training as one, and how an epoch of theirs is trained; whatever process it is in."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch

from lowrank_tune.lowrank.fused import train_together
from lowrank_tune.trials.trial import TrialSession

logger = logging.getLogger(__name__)

Told = dict[str, Any] | OSError
"""What an epoch gave, or that this machine cannot reach the trial's files."""


class Fusion:
    """Trains epochs of trials that agree in their shape.

    Args:
        members: trials in one batched model, at most.

    Attributes:
        members: as given, and less once memory did not suffice.
    """

    def __init__(self, members: int) -> None:
        self.members = members

    def epoch(self, sessions: Sequence[TrialSession]) -> list[Told]:
        """Train an epoch of each; one that has something else to tell, or has to train in parts, does so by itself.

        Returns:
            What `TrialSession.epoch` gave for each, in their order.

        Raises:
            torch.AcceleratorError: this process has lost its device.
        """
        whole = [session for session in sessions if session.whole_trainer() is not None]
        trained = self._train(whole)
        return [_told(session, trained.get(session)) for session in sessions]

    def _train(self, sessions: Sequence[TrialSession]) -> dict[TrialSession, Any]:
        """Train as many at once as memory allows; what is missing in the answer is still to be trained, alone."""
        size = math.ceil(len(sessions) / max(1, math.ceil(len(sessions) / self.members)))
        if size < 2:
            return {}
        done: dict[TrialSession, Any] = {}
        for start in range(0, len(sessions), size):
            part = sessions[start : start + size]
            trainers = [trainer for session in part if (trainer := session.whole_trainer())]
            try:
                done |= zip(part, train_together(trainers), strict=True)
                continue
            except torch.AcceleratorError:
                raise
            except Exception as error:
                logger.warning("%d trials as one: %s; they go on in smaller groups", len(part), error)
            # Out of the handler: until here the error's traceback holds what the failed epoch had allocated.
            if trainers[0].device != "cpu":
                torch.cuda.empty_cache()
            self.members = min(self.members, len(part) // 2)
            return done | self._train(sessions[start:])
        return done


def _told(session: TrialSession, trained: Any) -> Told:
    try:
        return session.epoch(trained)
    except OSError as error:
        return error
