"""Losses kept on disk: one calibration serves every budget, target and curve.

An entry is found again by what it depends on: the model's files, the calibration tokens, how weights are rounded, the
estimator, the candidates of every linear, and how a reader rounds inputs.
"""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Callable

import torch

from ..files import disk_cache
from ..pipeline.fingerprint import key_of
from ..pipeline.run import Run
from ..spec import QuantSpec
from .base import Candidate, Losses

CACHE = "losses"  # the part of the disk cache
FORMAT = 5  # of an entry; also raised when an estimator changes what it finds

log = logging.getLogger(__name__)


def kept_losses(
    run: Run, tokens: torch.Tensor, estimator: str, specs: dict[str, list[QuantSpec]], measure: Callable[[], Losses]
) -> Losses:
    """Return what `measure` finds, or found for the same question in an earlier run.

    specs: the candidates of every linear. tokens: the calibration set (samples, T).
    """
    candidates = {name: [spec.to_dict() for spec in found] for name, found in specs.items()}
    question = {"estimator": estimator, "specs": candidates, "inputs": run.input_blocks}
    key = key_of(run, tokens, losses=FORMAT, **question)
    stored = disk_cache.load(CACHE, key)
    if stored is not None:
        log.info("losses of an earlier run were taken from %s", disk_cache.folder(CACHE))
        return _decode(stored)
    found = measure()
    disk_cache.store(CACHE, key, _encode(found))
    return found


def _encode(losses: Losses) -> bytes:
    found = {name: [[candidate.spec.to_dict(), candidate.loss] for candidate in of] for name, of in losses.items()}
    salience = {name: base64.b64encode(of.numpy().tobytes()).decode() for name, of in losses.salience.items()}
    return json.dumps({"losses": found, "salience": salience, "inputs": losses.inputs}).encode()


def _decode(content: bytes) -> Losses:
    stored = json.loads(content)
    found = {
        name: [Candidate(QuantSpec.from_dict(spec), loss) for spec, loss in of] for name, of in stored["losses"].items()
    }
    salience = {
        name: torch.frombuffer(bytearray(base64.b64decode(of)), dtype=torch.float16)
        for name, of in stored["salience"].items()
    }
    inputs = {name: {int(block): loss for block, loss in of.items()} for name, of in stored["inputs"].items()}
    return Losses(found, salience, inputs)
