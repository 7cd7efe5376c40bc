"""The ways in which XLA writes which devices exchange something, on a mesh of 2 x 2 x 2."""

import pytest

from tests.sharding import hlo

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
