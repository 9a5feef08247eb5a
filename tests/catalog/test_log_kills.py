"""Kills at random moments of commits, folds and rollbacks: the catalog opens, and each row has its own vector.

One process imports what it needs and forks for each writer that is killed, so that a kill costs some milliseconds.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests import processes
from tests.processes import DIES_WITH_ITS_PARENT

pytestmark = pytest.mark.faults
_ROOT = Path(__file__).resolve().parents[2]
_DIM = 8
_SCRIPT = f"""{DIES_WITH_ITS_PARENT}
import os, random, signal, sys, time
sys.path[:0] = [{str(_ROOT)!r}]
from pathlib import Path
import numpy as np
from compllm_rag.catalog import generations
from compllm_rag.catalog.catalog import Catalog
from compllm_rag.catalog.rows import delete_rows, make_row, write_rows
generations.LEAST_LOG = 900  # a few records

def vector(name):
    made = np.random.default_rng([int(part) for part in name.split('-')]).standard_normal({_DIM}).astype(np.float32)
    return made / np.linalg.norm(made)

def write(path, seed, told):
    chance = random.Random(seed)
    with Catalog.open(path) as catalog:
        for step in range(10**6):
            names = [f'{{seed}}-{{step}}-{{place}}' for place in range(chance.randrange(6))]
            with catalog.writing() as connection:
                gone = [id_ for (id_,) in connection.execute('SELECT id FROM nodes') if chance.random() < 0.25]
                delete_rows(connection, gone)
                ids = write_rows(connection, [make_row(name, name, name, '{{}}') for name in names])
                vectors = catalog.vectors(changing=True)
                vectors.remove(gone)
                vectors.add(ids, np.array([vector(name) for name in names], np.float32).reshape(len(ids), {_DIM}))
            catalog.rollback() if chance.random() < 0.1 else catalog.commit()
            if chance.random() < 0.05:
                catalog.reclaim()
            os.write(told, b'.')

path, chance, logs = Path(sys.argv[1]), random.Random(3), 0
Catalog.create(path, {_DIM}).close()
for kill in range(int(sys.argv[2])):
    heard, told = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            write(path, kill + 1, told)
        finally:
            os._exit(1)
    os.close(told)
    for _ in range(chance.randrange(1, 7)):  # how long a step takes changes with what else the machine does
        begun = time.perf_counter()
        assert os.read(heard, 1) == b'.'
    time.sleep(chance.uniform(0, 1.5) * (time.perf_counter() - begun))
    os.kill(child, signal.SIGKILL)
    os.close(heard)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    with Catalog.open(path, read_only=True) as catalog, catalog.snapshot() as (connection, vectors):
        rows = dict(connection.execute('SELECT id, node_id FROM nodes').fetchall())
        assert vectors.ids().tolist() == sorted(rows)
        for id_, found in vectors.get(rows).items():
            assert np.array_equal(found, vector(rows[id_])), rows[id_]
    logs += any(path.glob('vectors-*.log'))
with Catalog.open(path) as catalog:
    print(catalog.generation, logs)
"""


def test_kills_at_random_moments(tmp_path: Path) -> None:
    kills = 30
    done = processes.run([sys.executable, "-c", _SCRIPT, str(tmp_path / "s"), str(kills)])
    assert done.returncode == 0, done.stderr
    generation, logs = map(int, done.stdout.split())
    assert generation > kills // 4  # they got somewhere
    assert logs > 0
