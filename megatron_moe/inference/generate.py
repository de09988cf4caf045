"""Tokens out of a model, one after another, on any layout.

All ranks run the same prompts. A pass goes through the pipeline stage by stage; one rank of the last stage gathers the
last row of logits over tp, chooses, and tells the world, so that no rounding can part the ranks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_moe.config.errors import ConfigError, DataError, NonFiniteError
from megatron_moe.inference.kv_cache import ReservedCache
from megatron_moe.inference.limits import refuse_undecodable
from megatron_moe.inference.sampling import Sampling, choose, draw_keys
from megatron_moe.layers.context import ForwardContext, SequenceView
from megatron_moe.models.gpt import GPTSpec, GPTStage
from megatron_moe.parallel.collectives import gather_rows
from megatron_moe.parallel.random import KeyedRandom
from megatron_moe.parallel.state import ParallelState
from megatron_moe.pipeline.transfer import Crossing, Transfer

_NOT_FINITE = -1  # told instead of a token, so that all ranks raise together


def refuse_context_parallelism(size: int) -> None:
    """Raises ConfigError for more than one context-parallel rank."""
    if size > 1:
        raise ConfigError(
            f"--context-parallel-size {size} cuts sequences, but tokens are decoded one at a time; use 1 (a checkpoint "
            f"loads on any layout), and --tensor-model-parallel-size or --pipeline-model-parallel-size for more room."
        )


def decoding_view(tokens: Tensor, start: int, sample_ids: Tensor, before: Tensor | None = None) -> SequenceView:
    """tokens (S, B) int64 that stand from index `start` on in their sequences, without padding; before: (B,) the ids
    of the tokens that precede them."""
    length, samples = tokens.shape
    rows = torch.arange(length, device=tokens.device)
    return SequenceView(
        tokens=tokens,
        positions=(rows + start)[:, None].expand(length, samples),
        segments=torch.zeros(length, samples, dtype=torch.int32, device=tokens.device),
        sample_ids=sample_ids,
        rows=rows,
        segmented=False,
        start=start,
        before=before,
    )


@dataclass(frozen=True)
class _Batch:
    """Prompts of one length that run together."""

    indices: list[int]  # places among the prompts of the call
    tokens: Tensor  # (S, B) int64
    sample_ids: Tensor  # (B,) int64


class Generator:
    """Goes on from prompts. Collective: all ranks make the same calls with the same arguments.

    stages: this rank's, one: more would only lengthen the way of each token.   spec: only ids below spec.vocab_size are
    chosen.   max_batch: prompts that may run together.   start_id: of an encoder-decoder model, whose encoder reads the
    prompts: what the decoder reads first.
    Raises ConfigError under context parallelism, and for a model that needs whole sequences.
    """

    def __init__(
        self,
        stages: Sequence[GPTStage],
        state: ParallelState,
        spec: GPTSpec,
        device: torch.device,
        *,
        max_batch: int = 16,
        start_id: int | None = None,
    ) -> None:
        refuse_context_parallelism(state.cp.size)
        if (start_id is None) == (spec.encoder_layers > 0):
            raise ValueError("a model with an encoder, and no other, wants start_id")
        self._start_id = start_id
        refuse_undecodable(spec)
        if max_batch < 1:
            raise ConfigError(f"--batch-size {max_batch}: expected 1 or more prompts at a time.")
        (self._stage,) = stages
        self._state = state
        self._vocab_size = spec.vocab_size
        self._device = device
        self._transfer = Transfer(state, device)
        # where samples share routing groups, one could push another's tokens out: each runs alone
        shared = any(layer.moe is not None and layer.moe.routing_group_samples > 1 for layer in spec.layers)
        self._max_batch = 1 if shared else max_batch
        self._speaker = state.world.size - state.stage.size  # the first rank of the last stage

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling,
        *,
        eod_id: int | None,
        seed: int,
        first_sample: int = 0,
    ) -> list[list[int]]:
        """The new tokens of each prompt: max_new_tokens, or as many as come before eod_id, which is left out.

        Draws depend on (seed, first_sample + place among the prompts, position) only, not on what runs beside.
        Raises ConfigError or DataError for arguments that cannot be, NonFiniteError when a logit is NaN or infinite.
        """
        if max_new_tokens < 1:
            raise ConfigError(f"--max-new-tokens {max_new_tokens}: expected 1 or more.")
        self._check(prompts)
        answers: list[list[int]] = [[] for _ in prompts]
        for batch in self._batches(prompts, first_sample):
            found = self._go_on(batch, max_new_tokens, sampling, eod_id, KeyedRandom(seed))
            for index, tokens in zip(batch.indices, found, strict=True):
                answers[index] = tokens
        return answers

    def _check(self, prompts: Sequence[Sequence[int]]) -> None:
        for number, prompt in enumerate(prompts, start=1):
            if not prompt:
                raise DataError(f"prompt {number} has no tokens; begin it with one, such as the end of a document.")
            wrong = [token for token in prompt if not 0 <= token < self._vocab_size]
            if wrong:
                raise DataError(
                    f"prompt {number} holds id {wrong[0]}, outside 0..{self._vocab_size - 1}; "
                    f"use the tokenizer that the model was trained with."
                )

    def _batches(self, prompts: Sequence[Sequence[int]], first_sample: int) -> Iterator[_Batch]:
        """Only prompts of one length run together: no padding, so that each is computed as if alone."""
        by_length: dict[int, list[int]] = {}
        for index, prompt in enumerate(prompts):
            by_length.setdefault(len(prompt), []).append(index)
        for same in by_length.values():
            for start in range(0, len(same), self._max_batch):
                indices = same[start : start + self._max_batch]
                tokens = torch.tensor([list(prompts[index]) for index in indices], dtype=torch.int64)
                sample_ids = torch.tensor(indices, dtype=torch.int64) + first_sample
                yield _Batch(indices, tokens.t().to(self._device), sample_ids.to(self._device))

    def _go_on(
        self, batch: _Batch, max_new_tokens: int, sampling: Sampling, eod_id: int | None, random: KeyedRandom
    ) -> list[list[int]]:
        samples = batch.tokens.shape[1]
        first = batch.tokens if self._start_id is None else torch.full_like(batch.tokens[:1], self._start_id)
        source = None if self._start_id is None else decoding_view(batch.tokens, 0, batch.sample_ids)
        length = len(first)
        most = length + max_new_tokens - 1  # the last token is not run
        cache = ReservedCache.for_stages([self._stage], max_length=most, num_samples=samples, device=self._device)
        answers: list[list[int]] = [[] for _ in range(samples)]
        ended = [False] * samples
        tokens, before = first, None
        for position in range(length, length + max_new_tokens):
            view = decoding_view(tokens, position - len(tokens), batch.sample_ids, before)
            logits = self._run(view, source, cache, random)
            uniform = random.at(stream="sample").uniform(draw_keys(batch.sample_ids.cpu(), position))
            chosen = self._agree(logits, uniform, sampling, position)
            for sample, token in enumerate(chosen.tolist()):
                ended[sample] |= token == eod_id
                if not ended[sample]:
                    answers[sample].append(token)
            if all(ended):
                break
            tokens, before = chosen[None], tokens[-1]
        return answers

    def _run(
        self, view: SequenceView, source: SequenceView | None, cache: ReservedCache, random: KeyedRandom
    ) -> Tensor | None:
        """One pass over the view's tokens: logits (B, V/tp) of the last row on the last stage, None elsewhere."""
        ctx = ForwardContext(
            view=view,
            random=random,
            train=False,
            sequence_parallel=False,
            cache=cache,
            source=source,
            encoded=source is not None and view.start > 0,
        )
        number = self._stage.number
        received = {}
        if not self._stage.first:
            received = self._transfer.receive_forward(self._stage.edge(number, ctx), Crossing(number, 0))
        output: dict[str, Tensor] = self._stage(received, ctx).tensors
        if self._stage.last:
            return output["logits"][-1]
        self._transfer.send_forward(output, self._stage.edge(number + 1, ctx), Crossing(number + 1, 0))
        self._transfer.finish()
        return None

    def _agree(self, logits: Tensor | None, uniform: Tensor, sampling: Sampling, position: int) -> Tensor:
        """(B,) int64 on the device: the next tokens, the same on all ranks of the world."""
        chosen = torch.full(uniform.shape, _NOT_FINITE, dtype=torch.int64)
        if logits is not None:
            columns = gather_rows(logits.t(), self._state.tp, logits.shape[1] * self._state.tp.size)
            # on the host, so that every kind of device draws alike
            whole = columns[: self._vocab_size].t().to("cpu", torch.float64).contiguous()
            if whole.isfinite().all():
                chosen = choose(whole, uniform, sampling)
        chosen = self._state.world.comm.broadcast_(chosen.to(self._device), self._speaker)
        if (chosen == _NOT_FINITE).any():
            raise NonFiniteError(
                f"the logits of position {position} are not finite: the checkpoint is of a run that diverged, or its "
                f"numbers leave the range of the type; try an earlier step (--ckpt-step) or --dtype fp32."
            )
        return chosen
