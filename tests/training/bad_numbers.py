"""One number of one step made NaN, at a chosen site, rank and micro-batch."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from megatron_moe.moe.experts import Experts
from megatron_moe.training import step as step_module
from megatron_moe.training.engine import Engine
from megatron_moe.training.step import StepProgram

SITES = ("loss", "activation", "gradient", "router logit", "expert output", "optimizer state")


@dataclass
class Strike:
    """site: one of SITES.   times: of so many passes over the micro-batch; 1: not when it is repeated."""

    site: str
    rank: int
    microbatch: int
    times: int = 1000
    expert: int | None = None  # struck, by global index
    layer: int | None = None
    tensor: str = ""  # of the optimizer
    _now: int = field(default=-1, repr=False)

    @classmethod
    def draw(cls, rng: random.Random, site: str, engine: Engine) -> "Strike":
        """The same on all ranks, which need one layout for it."""
        state, config = engine.state, engine.config.training
        rank = rng.randrange(state.world.size)
        if site == "loss":
            # what comes last in the pipeline
            ranks = state.world.size // state.pp.size
            rank = state.world.size - ranks + rng.randrange(ranks)
        return cls(site, rank, rng.randrange(config.global_batch_size // config.micro_batch_size // state.dp.size))

    def _due(self) -> bool:
        if self._now != self.microbatch or not self.times:
            return False
        self.times -= 1
        return True

    @contextmanager
    def on(self, engine: Engine) -> Iterator[None]:
        """Inside, the engine's steps are struck, on the rank that it is about."""
        if engine.state.rank != self.rank:
            yield
            return
        stage = engine.stages[-1]
        name, layer = list(stage.layers.items())[-1]
        self.layer = int(name)
        forward = StepProgram.forward

        def followed(program: StepProgram, number: int, microbatch: int, *rest: Any, **named: Any) -> Any:
            self._now = microbatch
            return forward(program, number, microbatch, *rest, **named)

        with mock.patch.object(StepProgram, "forward", followed), self._struck(engine, layer):
            yield

    def _struck(self, engine: Engine, layer: Any) -> Any:
        sites: dict[str, Callable[[], Any]] = {
            "loss": lambda: mock.patch.object(step_module, "token_losses", self._losses(step_module.token_losses)),
            "activation": lambda: _hooked(layer.attention, self._output),
            "gradient": lambda: _hooked(layer.attention, self._gradient),
            "router logit": lambda: mock.patch.object(layer.mlp.router, "logits", self._logits(layer.mlp.router)),
            "expert output": lambda: _hooked(layer.mlp.experts, self._answers),
            "optimizer state": lambda: self._stored(engine),
        }
        return sites[self.site]()

    def _losses(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def bad(*arguments: Any) -> Any:
            found = real(*arguments)
            return replace(found, cross_entropy=_with_nan(found.cross_entropy)) if self._due() else found

        return bad

    def _output(self, module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        return _with_nan(output) if self._due() else output

    def _gradient(self, module: nn.Module, arguments: Any, output: Tensor) -> None:
        if self._due():
            output.register_hook(_with_nan)

    def _logits(self, router: Any) -> Callable[..., Tensor]:
        real = router.logits
        return lambda *arguments: _with_nan(real(*arguments)) if self._due() else real(*arguments)

    def _answers(self, module: Experts, arguments: Any, output: Tensor) -> Tensor:
        counts: list[int] = arguments[1]
        if not sum(counts) or not self._due():
            return output
        local = max(index for index, count in enumerate(counts) if count)
        self.expert = module.ep.rank * len(counts) + local
        return _with_nan(output, row=sum(counts[:local]))

    @contextmanager
    def _stored(self, engine: Engine) -> Iterator[None]:
        blocks = [block for block in engine.optimizer.blocks() if block.tensor.numel()]
        block = blocks[self.microbatch * 7 % len(blocks)]
        self.tensor = block.name
        element = block.tensor.view(-1)[:1]
        kept = element.clone()
        element.fill_(float("nan"))
        try:
            yield
        finally:
            element.copy_(kept)


@contextmanager
def _hooked(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _with_nan(tensor: Tensor, row: int = 0) -> Tensor:
    """One element of it is NaN, of the given index of the first dimension."""
    spoilt = torch.zeros_like(tensor)
    (spoilt[row] if tensor.dim() else spoilt).view(-1)[0] = float("nan")
    return tensor + spoilt
