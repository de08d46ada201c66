"""What a training step needs of a device: the parts of its state, and what moves."""

import math

import pytest

from hydrax.core.build import ConfigError, build
from hydrax.core.config import load_config
from hydrax.eval import dry_run
from hydrax.parallel.mesh import MeshConfig
from hydrax.train.config import RunConfig

HLO = """
HloModule jit_step, is_scheduled=true, num_partitions=8
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(f32[] %a, f32[] %b)
}

%inner (p: f32[8]) -> f32[8] {
  %gather = bf16[4,8]{1,0} all-gather(bf16[1,8]{1,0} %x), replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %both = (f32[8]{0}, f32[2]{0}) all-reduce(f32[8]{0} %p, f32[2]{0} %q), replica_groups={{0,1},{2,3}}
}

%outer (p: f32[8]) -> f32[8] {
  ROOT %w = f32[8]{0} while(f32[8]{0} %p), condition=%c, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
}

%other (p: f32[8]) -> f32[8] {
  ROOT %start = f32[8]{0} collective-permute-start(f32[8]{0} %p), source_target_pairs={{0,1}}
  %async = (f32[2]{0}, f32[8]{0}) all-gather-start(f32[2]{0} %p), replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
  %part = f32[2]{0} reduce-scatter(f32[16]{0} %p), to_apply=%add
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %w = f32[8]{0} while(f32[8]{0} %p), condition=%c, body=%outer, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %c = f32[8]{0} conditional(s32[] %i, f32[8]{0} %w, f32[8]{0} %w), branch_computations={%other, %nothing}
}
"""


def config(mesh: MeshConfig) -> RunConfig:
    small = {"model.pattern": "gla", "model.d_model": 16, "data.seq_len": 16, "train.batch_size": 2}
    values = load_config("quickstart", **small, **{"mesh.fsdp": mesh.fsdp, "mesh.tensor": mesh.tensor})
    return build(RunConfig, values.to_dict())


def sizes(text: str) -> MeshConfig:
    return dry_run.mesh_sizes(text, MeshConfig(strategy="ring"))


def test_collectives_count_as_often_as_their_loop_runs():
    found = {c.kind: (c.count, c.nbytes, c.received) for c in dry_run.collectives(HLO)}
    assert found == {
        "all-gather": (16, 15 * 4 * 8 * 2 + 8 * 4, 15 * 3 * 8 * 2 + 3 * 2 * 4),  # of 4, without a device's own
        "all-reduce": (15, 15 * (8 + 2) * 4, 15 * (8 + 2) * 4),  # of 2: half of it to sum, half of the sums
        "reduce-scatter": (1, 2 * 4, 7 * 2 * 4),  # of all 8
        "collective-permute": (1, 8 * 4, 8 * 4),
    }


def test_a_device_holds_its_part():
    found = dry_run.dry_run(config(sizes("tensor=2, fsdp=2")), largest=1000)
    assert sizes("context=2").strategy == "ring"
    assert found.mesh == {"replica": 1, "fsdp": 2, "context": 1, "expert": 1, "tensor": 2}
    assert len(found.parameters) == found.arrays
    assert found.memory["parameters"] == sum(4 * math.prod(p.shard) for p in found.parameters)
    gate = next(p for p in found.parameters if p.name.endswith("ffn/gate/kernel"))
    assert gate.partition == ("", "fsdp", "tensor")
    assert math.prod(gate.shape) == 4 * math.prod(gate.shard)
    assert {"all-gather", "all-reduce"} <= {c.kind for c in found.collectives}
    assert [len(table.columns) for table in dry_run.tables(found)] == [2, 4, 5]


@pytest.mark.parametrize("text", ["fsdp", "fsdp=0", "fsdp=-1", "data=2", "fsdp=2;tensor=2", "fsdp=two"])
def test_a_wrong_mesh_is_named(text):
    with pytest.raises(ConfigError, match=r"mesh = .*expected <axis>=<devices>.*replica, fsdp, context"):
        sizes(text)


def test_a_batch_that_does_not_divide_is_named():
    with pytest.raises(ConfigError, match=r"train\.batch_size = 2: expected a multiple of 4"):
        dry_run.dry_run(config(sizes("fsdp=4")))
