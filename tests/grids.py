"""Segments to text and back, for golden grids, and random sequences of calls for the sweeps."""

import random

from paci_schedule.core.lower import Lowering
from paci_schedule.core.ops import Op
from paci_schedule.core.schedules import one_f_one_b, paci


def text(ops):
    """Ops as they print, separated by spaces."""
    return " ".join(map(str, ops))


def parsed(line):
    """The ops that a line of text stands for."""
    return [Op.parse(word) for word in line.split()]


def compute_grid(segments):
    """For every segment the compute ops of every stage, as text."""
    return [[text(segment.ops(stage)) for stage in range(segment.spec.stages)] for segment in segments]


def programs(segments, stage, **options):
    """For every segment the whole program of a stage, messages and all; `options` are those of `Lowering`."""
    lowering = Lowering(paci.Paci(), segments[0].spec, stage, **options)
    return [lowering.program(segment) for segment in segments]


def program_grid(segments, **options):
    """For every segment the whole program of every stage, as text."""
    stages = [programs(segments, stage, **options) for stage in range(segments[0].spec.stages)]
    return [[text(program) for program in each] for each in zip(*stages, strict=True)]


def calls(spec, script):
    """The segments of a script: "t" is a train_batch, "d" a drain.  The pipe is drained at the end."""
    segments, admitted = [], 0
    for letter in script.rstrip("d") + "d":
        if letter == "t":
            segments.append(paci.train_batch(spec, admitted))
            admitted += spec.accumulation
        elif admitted:
            segments.append(paci.drain(spec, admitted))
            admitted = 0
    return segments


def leading_calls(spec, count, end=None):
    """The first `count` calls of the leading cut; the pipe is empty after `end` micro-batches."""
    return [paci.lead_batch(spec, number * spec.accumulation, end) for number in range(count)]


def flushed_calls(spec, count):
    """Batches of 1F1B, each from an empty pipe to an empty pipe."""
    return [one_f_one_b.batch(spec)] * count


def random_script(seed, length):
    """A script of `length` letters, about one drain in four."""
    return "".join(random.Random(seed).choice("tttd") for _ in range(length))
