"""Benchmarks of trained models, ours and others': python -m motif_jax.bench COMMAND ...; COMMAND --help explains each."""

import argparse
import importlib
import sys

from motif_jax import commands
from motif_jax.bench.arguments import Parser
from motif_jax.errors import UserError

# Each module has `add_arguments(parser)` and `run(arguments)`, and is loaded only when its command is called.
COMMANDS = {
    "ablation": ("motif_jax.bench.ablation", "arms of the ablation against each other on the synthetic world"),
    "annotate": ("motif_jax.bench.annotate", "let people judge: build a study of video pairs, serve it, export the votes"),
    "generate": ("motif_jax.bench.generate", "videos of every pair of a list, for one or more seeds, from a trained run"),
    "report": ("motif_jax.bench.preference_report", "what the votes say: win rates, reasons, agreement, as a page and a json"),
    "score": ("motif_jax.bench.score", "motion, steadiness and likeness to the image of any model's videos, as a page and tables"),
    "synthetic": ("motif_jax.bench.synthetic", "how often samples of the synthetic world do what their sentence says"),
}


def main(argv: list[str]) -> None:
    commands.begin("motif_jax.bench", argv)
    overview = Parser(
        prog="python -m motif_jax.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="commands:\n" + "\n".join(f"  {name:<12}{summary}" for name, (_, summary) in COMMANDS.items()),
    )
    overview.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    try:
        name = overview.parse_args(argv[:1]).command
    except UserError as error:
        sys.exit(f"motif_jax.bench: {error}")
    commands.keep_compiled_programs()
    command = importlib.import_module(COMMANDS[name][0])
    parser = Parser(prog=f"{overview.prog} {name}", description=command.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_arguments(parser)
    for argument in argv[1:]:  # an empty path would be the current directory
        if not argument or (argument.startswith("--") and argument.endswith("=")):
            sys.exit(f"motif_jax.bench {name}: {argument or 'an argument'} is empty: give it a value, or leave it out")
    try:
        with commands.interrupts_reported(f"motif_jax.bench {name}"), commands.memory_errors_reported():
            command.run(parser.parse_args(argv[1:]))
    except (UserError, OSError) as error:  # the latter names a file that cannot be read or written
        sys.exit(f"motif_jax.bench {name}: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
