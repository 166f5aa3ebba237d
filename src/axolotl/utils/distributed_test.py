"""Two real processes talk over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from axolotl.utils import distributed
from tests.integration.training_runs import Store


def run_on_two_ranks(code: str, tmp_path) -> list[subprocess.CompletedProcess]:
    """Run `code` on two ranks; `rank` and `distributed` are there."""
    script = tmp_path / "ranks.py"
    prelude = """
        import sys, time
        from axolotl.utils import distributed
        distributed.init_distributed_state()
        rank = distributed.get_rank()
        assert distributed.is_distributed() and distributed.get_world_size() == 2
    """
    script.write_text(textwrap.dedent(prelude) + textwrap.dedent(code) + "\ndistributed.cleanup_distributed()\n")
    store = Store()
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, script],
            env=shared | store.environment(rank, 2),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    results = []
    for process in ranks:
        try:
            out, err = process.communicate(timeout=240)
        finally:
            process.kill()
        results.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return results


def test_two_ranks(tmp_path):
    """One pair of processes for everything: starting them costs more than all that they do."""
    trace = tmp_path / "trace"
    code = f"""
        big = 2**53 + 1  # a float would round it
        assert distributed.gather_scalar_from_all_ranks(lambda: big + rank, 2) == ([big, big + 1] if rank == 0 else None)
        assert distributed.gather_from_all_ranks(lambda: {{"rank": rank}}) == ([{{"rank": 0}}, {{"rank": 1}}] if rank == 0 else None)
        assert distributed.gather_on_all_ranks({{"rank": rank}}) == [{{"rank": 0}}, {{"rank": 1}}]
        assert distributed.compute_and_broadcast(lambda: big if rank == 0 else 1 / 0) == big
        assert distributed.reduce_and_broadcast(lambda: rank + 0.5, sum) == 2.0
        assert distributed.broadcast_dict({{"rank": rank}}) == {{"rank": 0}}
        assert distributed.is_main_process() == (rank == 0)
        with distributed.zero_only() as first:
            assert first == (rank == 0)
        print("values")

        for turn in range(3):
            with distributed.zero_first(rank == 0):
                if rank == 0:
                    time.sleep(0.3)
                with open({str(trace)!r}, "a") as file:
                    file.write(f"{{turn}}{{rank}} ")
            distributed.barrier()
        print("order")

        def fail():
            raise ValueError("no rows")

        def outcome(action):
            try:
                action()
            except (ValueError, distributed.RankFailed) as err:
                return type(err).__name__, "no rows" in str(err)

        def wait():
            with distributed.zero_first(rank == 0):
                if rank == 0:
                    fail()

        expected = ("ValueError", True) if rank == 0 else ("RankFailed", True)
        assert outcome(wait) == expected
        assert outcome(lambda: distributed.compute_and_broadcast(fail)) == expected
        distributed.barrier()
        print("failures")
    """
    for result in run_on_two_ranks(code, tmp_path):
        assert result.returncode == 0, result.stderr
        assert result.stdout.split() == ["values", "order", "failures"]
    assert trace.read_text().split() == ["00", "01", "10", "11", "20", "21"]


class TestOneProcess:
    @pytest.fixture(autouse=True)
    def alone(self, monkeypatch):
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
            monkeypatch.delenv(name, raising=False)

    def test_does_the_obvious(self):
        distributed.init_distributed_state()
        assert not distributed.is_distributed()
        assert distributed.is_main_process() and distributed.is_local_main_process()
        assert distributed.get_world_size() == 1 and distributed.get_rank() == 0
        assert distributed.compute_and_broadcast(lambda: 3) == 3
        assert distributed.gather_scalar_from_all_ranks(lambda: 3, world_size=1) == [3]
        assert distributed.gather_on_all_ranks("one") == ["one"]
        assert distributed.reduce_and_broadcast(lambda: 3, max) == 3
        assert distributed.broadcast_dict({"a": 1}) == {"a": 1}
        distributed.barrier()
        with distributed.zero_first(True):
            pass
        distributed.cleanup_distributed()

    def test_before_the_group_exists_the_launcher_says_who_is_first(self, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "4")
        monkeypatch.setenv("RANK", "2")
        monkeypatch.setenv("LOCAL_RANK", "0")
        assert distributed.get_world_size() == 4 and distributed.get_rank() == 2
        assert distributed.is_main_process()
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert not distributed.is_main_process()
