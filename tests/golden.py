"""Programs kept as text (`golden_programs.txt`): what every stage does in each call, messages and sums included.

`python -m tests.golden` prints what the present code makes; a difference is a change of behaviour.
"""

import hashlib
import itertools
import random
from pathlib import Path

from paci_schedule import PipelineSpec
from tests.grids import calls, flushed_calls, leading_calls, program_grid, random_script

FILE = Path(__file__).with_name("golden_programs.txt")


def cases(shapes):
    """(name, calls, options of their programs): both cuts and 1F1B, with slack, tied weights, early receives."""
    for stages, accumulation in shapes:
        seed = 31 * stages + accumulation
        uneven = tuple(random.Random(seed).choices((0, 1, 2), k=stages - 1))
        some = [(0, stages - 1), (stages // 2, stages - 1), tuple(range(0, stages, 2)), (0, 1)]
        slacks, ties = (0, 2, uneven) if stages > 1 else (0,), ((), some) if stages > 2 else ((),)
        for extra, tied, early in itertools.product(slacks, ties, (False, True)):
            spec = PipelineSpec(stages=stages, accumulation=accumulation, extra_in_flight=extra)
            full = 2 + -(-spec.look_ahead(0) // accumulation)
            ended = (leading_calls(spec, count, end=count * accumulation) for count in (2, full))
            runs = {
                "lagging": calls(spec, "t" * full + "d" + random_script(seed, 6)),
                "leading": list(itertools.chain(*ended)),
                "1f1b": flushed_calls(spec, 2),
            }
            for name, made in runs.items():
                if not (tied and name == "1f1b"):  # under a flush an update waits for its own sums
                    shape = f"{name} P={stages} a={accumulation} extra={extra} ties={len(tied)} early={early}"
                    yield shape, made, {"ties": tied, "early_receives": early}


def lines():
    """The programs of small pipelines, a line for each call and stage; of larger ones a digest for each case."""
    for name, made, options in cases([(1, 2), (2, 2), (3, 1), (3, 3)]):
        yield f"# {name}"
        for number, programs in enumerate(program_grid(made, **options)):
            for stage, program in enumerate(programs):
                yield f"{number}.{stage} {program}".rstrip()
    for name, made, options in cases(itertools.product((2, 4, 5, 6, 7, 9), (1, 2, 3, 5, 8))):
        found = "\n".join("|".join(programs) for programs in program_grid(made, **options))
        yield f"# {name}: {hashlib.sha256(found.encode()).hexdigest()[:16]}"


if __name__ == "__main__":
    print("\n".join(lines()))
