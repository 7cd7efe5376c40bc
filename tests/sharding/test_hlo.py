"""The ways in which XLA writes which devices exchange something, on a mesh of 2 x 2 x 2."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from cir_jax.sharding import hlo
from cir_jax.sharding.mesh import make_mesh

INNER = ((0, 2), (1, 3), (4, 6), (5, 7))  # the middle axis: what lies along fsdp


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("replica_groups={{0,2},{1,3},{4,6},{5,7}}, dimensions={0}", INNER),
        ("source_target_pairs={{0,2},{1,3},{4,6},{5,7}}", INNER),
        ("replica_groups=[2,4]<=[8], dimensions={0}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("replica_groups=[4,2]<=[2,2,2]T(0,2,1)", INNER),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_1'}", INNER),
        ("replica_groups=mesh['data'=2,'fsdp'=2,'tensor'=2] {'fsdp'}", INNER),
        (
            "replica_groups=mesh['data'=2,'fsdp'=2,'tensor'=2] {'data', 'tensor'}",
            ((0, 1, 4, 5), (2, 3, 6, 7)),
        ),
        (
            "replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,2,2]T(0,2,1)) {'axis_1'}",
            INNER,
        ),
    ],
)
def test_groups(written, expected):
    line = f"  %op = f32[2,8]{{1,0}} all-reduce(%p), channel_id=1, {written}, to_apply=%add"
    assert hlo.groups(line) == expected
    (collective,) = hlo.collectives(line)
    assert (collective.kind, collective.shapes) == ("all-reduce", ((2, 8),))


def test_another_way_is_refused():
    with pytest.raises(ValueError, match="not known here"):
        hlo.groups("%op = f32[2] all-reduce(%p), replica_groups=everyone")


PROGRAM = """
HloModule step

%fused.1 (p: f32[8,4]) -> f32[64,4] {
  %p = f32[8,4] parameter(0)
  %all-gather.1 = f32[64,4]{1,0} all-gather(%p), channel_id=1, replica_groups=[1,8]<=[8]
  %wide = f32[512,9]{1,0} broadcast(%all-gather.1), dimensions={}
  ROOT %start = (f32[64,4]) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%fused.2 (p: f32[8,4]) -> f32[64,4] {
  %all-gather.2 = f32[64,4]{1,0} all-gather(%p), channel_id=1, replica_groups=[1,8]<=[8]
  ROOT %done = f32[64,4] custom-call(%all-gather.2), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.1 (p: bf16[64,4]) -> bf16[8,4] {
  %all-reduce.1 = bf16[64,4]{1,0} all-reduce(%p), channel_id=2, replica_groups=[1,8]<=[8]
  ROOT %slice = bf16[8,4] dynamic-slice(%all-reduce.1, %i)
}

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %first = f32[64,4] fusion(%x), kind=kOutput, calls=%fused.1
  %second = f32[64,4] fusion(%x), kind=kOutput, calls=%fused.2
  %third = bf16[8,4] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}

%condition (p: (s32[], f32[8,4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(6)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (p: f32[8,4]) -> f32[8,4] {
  %loop = (s32[], f32[8,4]) while(%init), condition=%condition, body=%body
  %scattered = f32[8]{0} reduce-scatter(%y), channel_id=3, replica_groups=[1,8]<=[8]
  %sent = (f32[5], f32[5], u32[]) collective-permute-start(%z), source_target_pairs={{0,1}}
  ROOT %sum = f32[128,9]{1,0} all-reduce(%z), replica_groups={}, metadata={op_name="sum"}
}
"""


def test_traffic_counts_loops_and_what_is_spread_over_fusions_once():
    assert hlo.traffic(PROGRAM) == {
        "all-gather": hlo.Traffic(6, 6 * 64 * 4 * 4),
        "reduce-scatter": hlo.Traffic(6 + 1, 6 * 64 * 4 * 2 + 8 * 8 * 4),
        "collective-permute": hlo.Traffic(1, 5 * 4),
        "all-reduce": hlo.Traffic(1, 128 * 9 * 4),
    }


@pytest.mark.parametrize(
    "written",
    [
        "branch_computations={%one, %two}",
        "true_computation=%one, false_computation=%two",
    ],
)
def test_of_branches_the_dearest_counts(written):
    program = """
%one (p: f32[8]) -> f32[8] {
  ROOT %sum = f32[8]{0} all-reduce(%p), channel_id=1, replica_groups={}
}

%two (p: f32[8]) -> f32[8] {
  %more = f32[16]{0} all-gather(%p), channel_id=2, replica_groups={}
  ROOT %sum = f32[8]{0} all-reduce(%p), channel_id=3, replica_groups={}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  ROOT %either = f32[8]{0} conditional(%which, %p, %p), WRITTEN
}
"""
    assert hlo.traffic(program.replace("WRITTEN", written)) == {
        "all-gather": hlo.Traffic(1, 64),
        "all-reduce": hlo.Traffic(1, 32),
    }


def test_the_largest_arrays_are_outside_of_fusions():
    first, second, *_ = hlo.largest(PROGRAM, 3)
    assert first == (128 * 9 * 4, "f32[128,9]", "sum")
    assert second == (64 * 4 * 4, "f32[64,4]", "")


def test_a_loop_without_an_end_in_the_text_is_refused():
    endless = PROGRAM.replace("constant(6)", "parameter(0)")
    with pytest.raises(ValueError, match="nothing says how often it runs: %loop = "):
        hlo.traffic(endless)
    alone = "\n".join(line for line in endless.splitlines() if " fusion(" not in line)
    assert set(hlo.traffic(alone)) == {"reduce-scatter", "collective-permute", "all-reduce"}


def test_traffic_of_a_compiled_program():
    """As XLA writes it here: a loop of which each step sums over the devices."""
    mesh = make_mesh({"data": -1})

    def local(x):
        return jax.lax.scan(lambda c, _: (jax.lax.psum(c, "data") / 8, None), x, None, length=5)[0]

    specs = {"in_specs": P("data"), "out_specs": P("data"), "check_vma": False}
    step = jax.jit(jax.shard_map(local, mesh=mesh, **specs))
    text = step.lower(jax.ShapeDtypeStruct((16, 3), np.float32)).compile().as_text()
    assert hlo.traffic(text) == {"all-reduce": hlo.Traffic(5, 5 * 2 * 3 * 4)}
