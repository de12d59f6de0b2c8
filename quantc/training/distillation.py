"""The scales of a finished model, trained so that it predicts what the original predicts.

A step runs one batch through all blocks and back: blocks are read from the unfinished checkpoint one after the other,
run forward, and run once more on the way back, where each one's factors take their step by Adam. Memory holds one
block; the batch's hidden states before the others, factors and Adam's state are in files between their uses.

Source: the second stage of EfficientQAT (Chen et al. 2024, arXiv:2407.11062) trains scales end to end, there with the
whole model in memory and on the text's own next tokens; here the target is the original's distribution.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import torch
from torch import nn
from torch.func import functional_call

from ..calibration.hidden_states import HiddenStates
from ..calibration.stream import Batch
from ..frontend.source import cast_parameter, set_parameter
from ..graph.model_graph import Block
from ..graph.rewrite import weight_name
from ..numerics.adam import BETAS
from ..numerics.relaxed import no_factors, rescaled, with_scales
from ..pipeline.run import output_logits
from ..pipeline.work import FinishWork
from .reconstruction import HELD_OUT, Trained, is_check_due

CHUNK_VALUES = 2**22  # logits of one chunk of tokens: 16 MiB in float32, for each of a few tensors alive at once


class Distillation:
    """One run of it. tokens: int64 (samples, T). teacher: the outputs of the original's last block."""

    def __init__(self, work: FinishWork, tokens: torch.Tensor, teacher: HiddenStates, folder: Path, rate: float):
        self.work, self.tokens, self.teacher, self.rate = work, tokens, teacher, rate
        self.blocks = work.run.graph.blocks
        self._folder, self._factors, self._best = folder, folder / "factors", folder / "best-factors"
        self._factors.mkdir()
        self._best.mkdir()
        vocabulary = work.run.source.model.get_output_embeddings().weight.shape[0]
        self._chunk = max(1, CHUNK_VALUES // vocabulary)

    def train(self, steps: int) -> Trained:
        """Take the steps, and write the scales that did best on held-out batches, if any did better than the first.

        Returns mean KL divergences, nats per token.
        """
        run, batches = self.work.run, self.work.calibration.batches
        aside = list(batches[::HELD_OUT])
        own = [batch for batch in batches if batch not in aside] or aside
        run.progress.stage("Distilling", steps)
        with run.outside_loaded():
            self._cast_outside()
            trained = self._train(steps, own, aside)
        if trained.after < trained.before:
            self._write()
        run.progress.done()
        return trained

    def _train(self, steps: int, own: list[Batch], aside: list[Batch]) -> Trained:
        before = best = self._error(aside)
        generator = torch.Generator().manual_seed(0)
        order: list[int] = []
        for step in range(1, steps + 1):
            order = order or torch.randperm(len(own), generator=generator).tolist()
            self._step(own[order.pop()], self.rate * (1 - (step - 1) / steps))
            if is_check_due(step, steps) and (found := self._error(aside)) < best:
                best = found
                shutil.copytree(self._factors, self._best, dirs_exist_ok=True)
            self.work.run.progress.step(f"KL divergence {best:.4f} on held-out text, {before:.4f} at first")
        return Trained(before, best)

    def _cast_outside(self) -> None:
        """Give embedding and head the dtype that products have: half of their memory and time.

        In bfloat16 stories15M ends with the same KL divergence (0.1768, in float32 0.1769).
        """
        run, model = self.work.run, self.work.run.source.model
        for name in run.graph.outside_weights:
            cast_parameter(model, name, self.work.calibration.product_dtype)
            for twin in (twin for twin, stored in run.source.tied.items() if stored == name):
                set_parameter(model, twin, model.get_parameter(name))

    def _step(self, batch: Batch, rate: float) -> None:
        hidden = self.work.calibration.hidden(batch)
        count, shape = batch.count, (batch.count * len(self.blocks), *hidden.shape[1:])
        with closing(HiddenStates(shape, self._folder, in_file=True)) as inputs:
            for index, block in enumerate(self.blocks):
                inputs.write(index * count, hidden)
                hidden = self._forward(block, batch, hidden)
            _, gradient = self._compare(batch, hidden, with_gradient=True)
            for index, block in reversed(list(enumerate(self.blocks))):
                hidden = inputs.read(index * count, count, gradient.device)
                gradient = self._backward(block, batch, hidden, gradient, rate)

    @torch.no_grad()
    def _forward(self, block: Block, batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
        factors = self._read(block)[0]
        return self._run(block, batch, hidden, self._weights(block, factors))

    def _backward(
        self, block: Block, batch: Batch, hidden: torch.Tensor, gradient: torch.Tensor, rate: float
    ) -> torch.Tensor:
        """Step the block's factors, and return the gradient at its input."""
        factors, adam = self._read(block)
        leaf = hidden.requires_grad_()
        with torch.enable_grad():
            output = self._run(block, batch, leaf, self._weights(block, factors))
            output.backward(gradient.to(output.dtype))
        if adam is not None:
            for group in adam.param_groups:
                group["lr"] = rate
            adam.step()
            torch.save({"factors": factors, "adam": adam.state_dict()}, self._file(block))
        assert leaf.grad is not None
        return leaf.grad

    def _run(self, block: Block, batch: Batch, hidden: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        call = self.work.calibration.call(block, batch).with_hidden(hidden)
        module = self.work.run.source.model.get_submodule(block.name)
        with self.work.calibration.products():
            output = functional_call(module, weights, call.args, call.kwargs)
        return block.returns.unwrap(output, call).float()

    def _weights(self, block: Block, factors: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
        """Return all of the block's tensors, by their names inside it."""
        device = self.work.run.device
        weights = {name: tensor.to(device) for name, tensor in self.work.floats(block).items()}
        for linear, tensor in self.work.qtensors(block).items():
            moved = factors.get(linear.name)
            weight = tensor.effective_weight() if moved is None else rescaled(tensor, moved)
            weights[weight_name(block, linear)] = weight.transpose(-1, -2) if linear.transposed else weight
        return weights

    def _error(self, batches: list[Batch]) -> float:
        total = 0.0
        for batch in batches:
            hidden = self.work.calibration.hidden(batch)
            for block in self.blocks:
                hidden = self._forward(block, batch, hidden)
            total += self._compare(batch, hidden)[0]
        return total / len(batches)

    def _compare(self, batch: Batch, hidden: torch.Tensor, with_gradient: bool = False) -> tuple[float, torch.Tensor]:
        """Return the mean KL divergence from the original's predictions, and its gradient at hidden, or zeros."""
        total, gradient = 0.0, torch.zeros_like(hidden)
        count = hidden.shape[0] * hidden.shape[1]
        wanted = self.teacher.read(batch.start, batch.count).to(hidden.device)
        for sample, part in self._chunks(hidden):
            tokens = self.tokens[batch.start + sample, part][None]
            leaf = hidden[sample, part][None].detach().requires_grad_(with_gradient)
            with torch.no_grad():
                target = self._predictions(tokens, wanted[sample, part][None])
            with torch.set_grad_enabled(with_gradient):
                found = self._predictions(tokens, leaf)
                loss = nn.functional.kl_div(found, target, reduction="sum", log_target=True) / count
            total += float(loss.detach())
            if with_gradient:
                gradient[sample, part] = torch.autograd.grad(loss, leaf)[0][0]
        return total, gradient

    def _predictions(self, tokens: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logarithms of probabilities, float32."""
        with self.work.calibration.products():
            return torch.log_softmax(output_logits(self.work.run, tokens, hidden).float(), -1)

    def _chunks(self, hidden: torch.Tensor) -> Iterator[tuple[int, slice]]:
        for sample in range(hidden.shape[0]):
            for start in range(0, hidden.shape[1], self._chunk):
                yield sample, slice(start, start + self._chunk)

    def _read(self, block: Block) -> tuple[dict[str, nn.Parameter], torch.optim.Adam | None]:
        """Return the block's factors by linear, all 0 at first, and its Adam, None where no scales can be trained."""
        device, stored = self.work.run.device, None
        if self._file(block).exists():
            stored = torch.load(self._file(block), map_location=device, weights_only=True)
            factors = {name: nn.Parameter(tensor) for name, tensor in stored["factors"].items()}
        else:
            factors = {
                linear.name: nn.Parameter(no_factors(tensor).to(device))
                for linear, tensor in self.work.qtensors(block).items()
                if "scales" in tensor.spec.grid.trainable
            }
        adam = torch.optim.Adam(factors.values(), betas=BETAS) if factors else None
        if adam is not None and stored is not None:
            adam.load_state_dict(stored["adam"])
        return factors, adam

    def _file(self, block: Block) -> Path:
        return self._factors / f"{block.index}.pt"

    def _write(self) -> None:
        """Put the best scales into the checkpoint."""
        for block in self.blocks:
            file = self._best / f"{block.index}.pt"
            factors = torch.load(file, map_location="cpu", weights_only=True)["factors"] if file.exists() else {}
            for linear, tensor in self.work.qtensors(block).items():
                if linear.name in factors:
                    self.work.replace(linear, with_scales(tensor, factors[linear.name]))
