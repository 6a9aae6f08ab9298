"""The reading of collectives: hand-written HLO of each form, and a real program on eight fake devices with known traffic."""

import json
import os
import subprocess
import sys

from motif_jax.collectives import Traffic, collectives

HLO = """\
HloModule jit_step, entry_computation_layout={(f32[8,4]{1,0})->f32[8,4]{1,0}}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%fused (p: f32[8,4]) -> f32[2,4] {
  %p = f32[8,4]{1,0} parameter(0)
  ROOT %rs = f32[2,4]{1,0:T(8,128)} reduce-scatter(%p), channel_id=3, replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
}

%body (t: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %t = (s32[], f32[8,4]{1,0}) parameter(0)
  %v = f32[8,4]{1,0} get-tuple-element(%t), index=1
  %ar = f32[8,4]{1,0} all-reduce(%v), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%add
  %part = f32[2,4]{1,0} fusion(%v), kind=kCustom, calls=%fused
  ROOT %out = (s32[], f32[8,4]{1,0}) tuple(%i, %ar)
}

%condition (t: (s32[], f32[8,4])) -> pred[] {
  %t = (s32[]{:T(128)}, f32[8,4]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  %n = s32[]{:T(128)} constant(5)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%never (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  ROOT %a2a = f32[8,4]{1,0} all-to-all(%p), replica_groups={{0,1}}, dimensions={0}
}

ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %w = (s32[], f32[8,4]{1,0}) while(%init), condition=%condition, body=%body
  %gs = (bf16[2,4]{1,0}, bf16[8,4]{1,0:T(8,128)(2,1)}) all-gather-start(%y), channel_id=2, replica_groups=[2,4]<=[8], dimensions={0}
  %gd = bf16[8,4]{1,0} all-gather-done(%gs)
  %ps = (f32[8,4]{1,0}, f32[8,4]{1,0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  %pd = f32[8,4]{1,0} collective-permute-done(%ps)
  %two = (f32[4]{0}, f32[]) all-reduce-start(%a, %b), replica_groups={}, to_apply=%add
  ROOT %r = f32[8,4]{1,0} get-tuple-element(%w), index=1
}
"""

EIGHT_DEVICES = """
import json, jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from motif_jax.collectives import collectives

mesh = jax.make_mesh((8,), ("x",), (AxisType.Auto,))
rows, whole = NamedSharding(mesh, P("x")), NamedSharding(mesh, P())

x = jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=rows)
gather = jax.jit(lambda x: x * 2, out_shardings=whole).lower(x).compile()
reduce = jax.jit(lambda x: x.sum(0), out_shardings=whole).lower(x).compile()
print(json.dumps([collectives(c.as_text()) for c in (gather, reduce)]))
"""


def test_every_form_is_counted():
    assert collectives(HLO) == {
        "all-gather": Traffic(1, 64),
        "all-reduce": Traffic(5 + 1, 5 * 128 + 20),
        "reduce-scatter": Traffic(5, 5 * 128),
        "collective-permute": Traffic(1, 128),
    }


def test_a_loop_with_a_known_trip_count():
    told = HLO.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}')
    assert collectives(told)["reduce-scatter"] == Traffic(7, 7 * 128)


def test_a_program_of_eight_devices():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", EIGHT_DEVICES], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [{"all-gather": [1, 64 * 16 * 4]}, {"all-reduce": [1, 16 * 4]}]
