"""Which of the training cases of a Megatron-LM checkout would start under PACI, as far as their arguments tell.

python -m benchmarks.megatron_cases CHECKOUT

reads every `model_config.yaml` of the checkout's functional tests, and parses the arguments of those that train over
several pipeline stages with Megatron-LM's own parser.  It prints what is refused, how often, and how many are not.
Arguments that Megatron-LM's own checks would take without PACI, but not as PACI changes them, count as refused.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import io
import logging
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

CASES = "tests/functional_tests/test_cases"
_LISTS = {"--cuda-graph-modules", "--hierarchical-context-parallel-sizes"}  # which the test harness writes as "[a, b]"


def words(arguments: dict[str, Any]) -> Iterator[str]:
    """A case's arguments as a command line has them."""
    for flag, value in arguments.items():
        if value is False or value is None:
            continue
        yield flag
        if value is not True:
            several = value if isinstance(value, list) else shlex.split(str(value).replace("\\", ""))  # escaped twice
            yield from (str(word).strip("[],") if flag in _LISTS else str(word) for word in several)


def cases(checkout: Path) -> Iterator[tuple[str, list[str]]]:
    """The names and the command lines of the cases that train over several stages."""
    for file in sorted((checkout / CASES).glob("**/model_config.yaml")):
        arguments = (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get("MODEL_ARGS")
        if not isinstance(arguments, dict) or "--lr" not in arguments:
            continue
        stages = arguments.get("--pipeline-model-parallel-size", 1)
        if isinstance(stages, int) and stages > 1:
            yield str(file.parent.relative_to(checkout / CASES)), list(words(arguments))


def refusals(checkout: Path) -> dict[str, list[str]]:
    """The flags for which each case is refused."""
    from testing.megatron_cpu import shim

    shim.install()
    sys.path.insert(0, str(checkout))
    arguments = import_module("megatron.training.arguments")

    from paci_schedule.adapters.megatron.parsing import argument_reasons, set_aside
    from paci_schedule.launch import without_reruns

    logging.disable()
    parser = arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    found = {}
    for name, line in cases(checkout):
        complaint = io.StringIO()
        try:
            with contextlib.redirect_stderr(complaint):
                args, _ = parser.parse_known_args([*line, *without_reruns(line)])
        except (Exception, SystemExit) as error:
            found[name] = [f"Megatron-LM's parser: {complaint.getvalue()[-200:].strip() or repr(error)}"]
            continue
        args.rank = 1  # which logs nothing
        args.world_size = args.pipeline_model_parallel_size * args.tensor_model_parallel_size
        args.world_size *= args.context_parallel_size * args.expert_model_parallel_size
        stock = complaint_of(arguments.validate_args, copy.deepcopy(args))
        set_aside(args)
        found[name] = [re.sub(r" \(.*", "", reason, flags=re.DOTALL) for reason in argument_reasons(args)]
        ours = complaint_of(arguments.validate_args, args)
        if ours and not stock:
            found[name].append(f"Megatron-LM's own checks: {ours}")
    return found


def complaint_of(validate: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> str:
    """What Megatron-LM's checks have against these arguments, or nothing."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            validate(args)
    except (Exception, SystemExit) as error:
        return str(error) or repr(error)
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="of Megatron-LM")
    parser.add_argument("--list", action="store_true", help="name the cases that are refused")
    options = parser.parse_args()
    found = refusals(options.checkout.resolve())
    counted = collections.Counter(flag for flags in found.values() for flag in set(flags))
    alone = collections.Counter(flags[0] for flags in found.values() if len(set(flags)) == 1)
    print("cases  only this one  refused for")
    for flag, count in counted.most_common():
        print(f"{count:5}  {alone[flag]:13}  {flag}")
    if options.list:
        for name, flags in found.items():
            if flags:
                print(f"{name}: {', '.join(flags)}")
    print(f"{sum(not flags for flags in found.values())} of {len(found)} cases are not refused")


if __name__ == "__main__":
    main()
