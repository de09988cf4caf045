"""Weight gradients in flat wide buckets, summed over the ranks that share a weight.

The loss is already divided by the count of the whole batch, so gradients are summed, never averaged. Sums and gathers
may travel while computing goes on: gradients from the moment that a layer is done with, weights until a layer begins.
"""

from collections import Counter
from collections.abc import Hashable, Sequence

from megatron_moe.optim.bucket import Bucket, NamedParameter, aligned, layer_of
from megatron_moe.parallel.layout import layout_of
from megatron_moe.parallel.state import ParallelState


def _group(members: Sequence[NamedParameter], bucket_elements: int, shared: set[int]) -> list[list[NamedParameter]]:
    """Parameters that are reduced alike, in at most `bucket_elements` at a time; none is cut."""
    alike: dict[tuple[Hashable, ...], list[list[NamedParameter]]] = {}
    for name, parameter in members:
        layout = layout_of(parameter)
        # what is in no layer is complete only at the end of a stage
        in_layer = layer_of(name) is not None
        kind = (layout.reduce_over, layout.sum_over, parameter.dtype, id(parameter) in shared, in_layer)
        groups = alike.setdefault(kind, [[]])
        filled = sum(aligned(member.numel()) for _, member in groups[-1])
        if filled and filled + parameter.numel() > bucket_elements:
            groups.append([])
        groups[-1].append((name, parameter))
    return [group for groups in alike.values() for group in groups]


def _once(stages: Sequence[Sequence[NamedParameter]]) -> list[list[NamedParameter]]:
    """Each parameter with the first stage that has it."""
    known: set[int] = set()
    found = []
    for stage in stages:
        found.append([(name, weight) for name, weight in stage if id(weight) not in known])
        known |= {id(weight) for _, weight in stage}
    return found


class GradientBuckets:
    """All buckets of this rank's stages; makes the parameters' storage and `main_grad`.

    stages: named parameters of each stage in order; frozen ones are left alone.  bucket_elements: size of a bucket.
    sharded: each rank of the axis owns a part (ZeRO-1), instead of all of them everything.
    overlap: sums travel while computing goes on, until the last call of `reduce`.
    Every rank of a stage must ask for the same reductions in the same order.
    """

    def __init__(
        self,
        stages: Sequence[Sequence[NamedParameter]],
        state: ParallelState,
        *,
        bucket_elements: int,
        sharded: bool,
        overlap: bool = False,
    ) -> None:
        trained = [[(name, weight) for name, weight in stage if weight.requires_grad] for stage in stages]
        weights = [weight for stage in trained for _, weight in stage]
        if not weights:
            raise ValueError("this rank has no parameter to train")
        shared = {number for number, times in Counter(map(id, weights)).items() if times > 1}
        self.state = state
        self.device = weights[0].device
        self.buckets = [
            Bucket(stage, members, state, sharded, shared=id(members[0][1]) in shared)
            for stage, named in enumerate(_once(trained))
            for members in _group(named, bucket_elements, shared)
        ]
        self._overlap = overlap
        self._waiting = list(self.buckets)
        self._under_way: list[Bucket] = []

    def zero_(self) -> None:
        """Start a step: no gradient yet."""
        for bucket in self.buckets:
            bucket.gradients.zero_()
        self._waiting = list(self.buckets)

    def layer_done(self, stage: int, layer: int) -> None:
        """Tell that the gradients of this stage's layers from `layer` on are complete."""
        if self._overlap:
            self._reduce([bucket for bucket in self._local(stage) if bucket.is_done_with(layer)])

    def reduce(self, stage: int | None = None) -> None:
        """Sum the gradients of one stage, once they are complete; without a stage, of all that is left.

        What is tied across stages, of the pipeline or of this rank, is summed only by the last call, without a stage:
        earlier, the other end of the pipeline may be waiting for this rank's own work.
        """
        if stage is not None:
            self._reduce(self._local(stage))
            return
        # those that wait for other stages come last, in an order that does not follow from which stages a rank has
        self._reduce(
            sorted(self._waiting, key=lambda bucket: (not bucket.is_local, "" if bucket.is_local else bucket.name))
        )
        for bucket in self._under_way:
            bucket.finish_reduce()
        self._under_way = []

    def _local(self, stage: int) -> list[Bucket]:
        return [bucket for bucket in self._waiting if bucket.stage == stage and bucket.is_local]

    def _reduce(self, chosen: Sequence[Bucket]) -> None:
        self._waiting = [bucket for bucket in self._waiting if bucket not in chosen]
        for bucket in chosen:
            if self._overlap:
                bucket.start_reduce()
                self._under_way.append(bucket)
            else:
                bucket.reduce()

    def await_weights(self, layer: int | None) -> None:
        """Wait until the weights of a layer, or those outside of all layers, have been gathered."""
        for bucket in self.buckets:
            if layer in bucket.layers:
                bucket.finish_gather()

    def settle(self) -> None:
        """Wait until all weights have been gathered."""
        for bucket in self.buckets:
            bucket.finish_gather()
