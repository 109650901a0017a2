"""Records a build through Ray Data, whose pool of actors grows and shrinks with the cluster.

    python examples/ray_data.py BUILD_FILE MAX_ACTORS

One row of the data is one shard. Every machine must reach the folder of the command and the cache.
"""

import os
import sys
from pathlib import Path

import ray

from cache_service.config import load_yaml_config
from cache_service.recording.build_config import BuildConfig
from cache_service.recording.comparison import check_teacher
from cache_service.recording.context import open_build
from cache_service.recording.engines import prepare
from cache_service.recording.record import open_writer, record
from cache_service.recording.shards import Part, all_shards


class Recorder:
    """Loads the teacher once, then records one shard a call."""

    def __init__(self, file, folder):
        os.chdir(folder)  # relative paths of the build file
        self.build = open_build(load_yaml_config(BuildConfig, file))
        check_teacher(self.build)  # this machine may have another checkpoint at the same path
        self.writer = open_writer(self.build)

    def __call__(self, row):
        part = Part(row["shard"], self.build.spec.num_shards)  # of one seed: exactly this shard
        committed = record(self.build, self.writer, seeds=(row["seed"],), part=part)
        return row | {"committed": committed}


def main(file, most):
    build = open_build(load_yaml_config(BuildConfig, file))
    prepare(build, on_message=print)  # scores the teacher and creates the cache
    shards = [shard._asdict() for shard in all_shards(build.spec, build.config.seeds)]
    rows = ray.data.from_items(shards, override_num_blocks=len(shards)).map(
        Recorder,
        fn_constructor_args=(file, str(Path.cwd())),
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=most),
        num_cpus=1,  # and num_gpus=1 for a teacher on a GPU
    )
    committed = sum(row["committed"] for row in rows.iter_rows())
    print(f"{build.config.cache}: {committed} shards recorded")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
