"""The registry of pipeline schedules: data, for each rank the list of entries that it plays.

A schedule is a pure function of the pipeline's shape, called as `SCHEDULES[name](shape)`; the entry also states what
its lists hold in memory and how long they take. `verify.py` proves any such list complete, ordered, free of deadlock
and within its memory; `planning/simulate.py` plays it.
"""

from megatron_moe.pipeline.interleaved import FORWARD_ONLY, INTERLEAVED
from megatron_moe.pipeline.one_forward_one_backward import ONE_FORWARD_ONE_BACKWARD, SEQUENTIAL, SPLIT
from megatron_moe.pipeline.overlap import OVERLAP
from megatron_moe.pipeline.schedule import Schedule
from megatron_moe.pipeline.zero_bubble import ZB_H1

TRAINING = (SEQUENTIAL, ONE_FORWARD_ONE_BACKWARD, SPLIT, ZB_H1, INTERLEAVED, OVERLAP)
SCHEDULES: dict[str, Schedule] = {schedule.name: schedule for schedule in TRAINING}
forward_only = FORWARD_ONLY
