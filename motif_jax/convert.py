"""Weights from PyTorch and back:

python -m motif_jax.convert import --kind=KIND --input=FILE --output=DIR [--yaml=FILE] [--weights=ema|raw]
    reads a .safetensors or PyTorch file (KIND: see below); DIR then serves as --config.init_from (raft: DIR/raft.safetensors as
    --config.prepare.flow_weights). Without the reference's YAML, or a readable one of the same name beside the file, the networks are
    read off the shapes of the tensors; --yaml= takes none. --weights=ema takes the average of the U-Net that the file keeps.
python -m motif_jax.convert export --workdir=DIR --output=FILE.safetensors|.ckpt [--weights=ema|raw] [--frozen]
    writes the U-Net (--frozen: also autoencoder and towers) in the reference's names, and FILE.yaml. DIR may be an import.
"""

import signal
import sys

from absl import flags

from motif_jax import commands
from motif_jax.data.storage import here
from motif_jax.errors import UserError

KIND = flags.DEFINE_enum(
    "kind", None, ["videocrafter", "dynamicrafter", "openclip", "openclip_image", "autoencoder", "raft"], "import: what the file holds"
)
INPUT = flags.DEFINE_string("input", None, "import: a .safetensors, .ckpt, .pth, .pt, .bin or .index.json file")
YAML = flags.DEFINE_string(
    "yaml", None, "import: the reference's configuration of that file (default: FILE.yaml if there is one; empty: none)"
)
WORKDIR = flags.DEFINE_string("workdir", None, "export: work directory of a run, or the directory of an import")
WEIGHTS = flags.DEFINE_enum(
    "weights", None, ["ema", "raw"], "averaged or raw weights (default: export: averaged if the run keeps them; import: raw)"
)
FROZEN = flags.DEFINE_boolean("frozen", False, "export: also write the autoencoder and the towers")
OUTPUT = flags.DEFINE_string("output", None, "import: a directory; export: FILE.safetensors or FILE.ckpt")

FLAGS = {"import": {"kind", "input", "yaml", "weights", "output"}, "export": {"workdir", "weights", "frozen", "output"}}
REQUIRED = {"import": ("kind", "input", "output"), "export": ("workdir", "output")}


def main(argv: list[str]) -> None:
    if len(argv) != 1 or argv[0] not in FLAGS:
        raise UserError("give one command, import or export" + (f", not {' '.join(argv)!r}" if argv else ""))
    command = argv[0]
    given = flags.FLAGS
    if absent := [name for name in REQUIRED[command] if not given[name].value]:
        raise UserError(f"{command} needs " + ", ".join(f"--{name}" for name in absent))
    if foreign := sorted(name for name in set().union(*FLAGS.values()) - FLAGS[command] if given[name].present):
        raise UserError(f"{command} does not take " + ", ".join(f"--{name}" for name in foreign))
    for stop in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stop, lambda *_: sys.exit(f"motif_jax.convert: stopped; {OUTPUT.value} was not written"))
    output = here(OUTPUT.value)
    if command == "import":
        from motif_jax.interop.imported import Import, import_checkpoint, yaml_beside

        yaml = YAML.value
        if yaml is None:
            yaml, remark = yaml_beside(KIND.value, INPUT.value)
            if remark:
                print(remark)
        counts, remarks = import_checkpoint(KIND.value, INPUT.value, output, yaml, WEIGHTS.value == "ema")
        for name, (tensors, parameters) in counts.items():
            print(f"{OUTPUT.value}/{name}.safetensors: {tensors} tensors, {parameters:,} parameters")
        if not yaml and KIND.value != "raft":
            remarks.append(f"assumed, for want of a --yaml: {Import(output).assumptions(counts)}")
    else:
        from motif_jax.training.export import export

        yaml, tensors, remarks = export(WORKDIR.value, output, WEIGHTS.value or "best", FROZEN.value)
        print(f"{OUTPUT.value}: {tensors} tensors; {yaml}")
    for remark in remarks:
        print(f"note: {remark}")


if __name__ == "__main__":
    commands.run("motif_jax.convert", main)
