"""Meshes, one rule table from logical to mesh axes, multi-host start-up, and plans made by compiling only."""

from qvdjax.parallel.memory import bytes_held, free
from qvdjax.parallel.mesh import MESH_AXES, make_mesh, parse_mesh
from qvdjax.parallel.planning import plan
from qvdjax.parallel.processes import check_same, on_first, to_host, together, with_the_others
from qvdjax.parallel.program import Program
from qvdjax.parallel.row_parallel import row_parallel
from qvdjax.parallel.rules import (
    RULES,
    Rules,
    abstract,
    constrain,
    left_whole,
    partition_spec,
    parts,
    place,
    process_rows,
    shard_batch,
    shardings,
)
from qvdjax.parallel.startup import initialize_distributed
from qvdjax.parallel.topology import chip_bytes, topology_mesh

__all__ = [
    "MESH_AXES",
    "RULES",
    "Program",
    "Rules",
    "abstract",
    "bytes_held",
    "check_same",
    "chip_bytes",
    "constrain",
    "free",
    "initialize_distributed",
    "left_whole",
    "make_mesh",
    "on_first",
    "parse_mesh",
    "partition_spec",
    "parts",
    "place",
    "plan",
    "process_rows",
    "row_parallel",
    "shard_batch",
    "shardings",
    "to_host",
    "together",
    "topology_mesh",
    "with_the_others",
]
