"""In a real Jupyter kernel: cells, labelled output, blame, the stop button."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Iterator

import pytest
from launch_kernels import SETUP, Kernel, a_kernel


@pytest.fixture(scope="module")
def kernel() -> Iterator[Kernel]:
    with a_kernel() as kernel:
        reply = kernel.run(SETUP)
        assert reply.status == "ok", reply
        yield kernel


def cell(text: str) -> str:
    return textwrap.dedent(text).strip() + "\n"


def test_a_cells_function_closure_lambda_and_class_reach_the_ranks(kernel: Kernel) -> None:
    reply = kernel.run(
        cell(
            """
            offset = 10
            class Adder:
                def __init__(self, n): self.n = n
                def __call__(self, x): return x + self.n + offset
            def outer(k):
                def inner(): return Adder(k)(rank())
                return inner
            print(list(launch(outer(5), nprocs=2)), list(launch(lambda: rank() * offset, nprocs=2)))
            value = launch(lambda: Adder(rank()), nprocs=2)[1]
            print(type(value) is Adder, value.n)
            """
        )
    )
    assert reply.out == "[15, 16] [0, 10]\nTrue 1\n"


def test_globals_a_function_makes_are_there_in_the_next_call(kernel: Kernel) -> None:
    reply = kernel.run(
        cell(
            """
            def count():
                global counted
                counted = globals().get("counted", 0) + step
                return counted
            def again(): return counted
            step = 2
            with Ranks(2) as ranks:
                ranks.push(pushed=5)
                print(ranks(count)[0], ranks(count)[1], ranks(again)[0], ranks(lambda: pushed)[1])
            """
        )
    )
    assert reply.out == "2 4 4 5\n"


def test_ranks_work_after_the_kernel_has_used_many_threads(kernel: Kernel) -> None:
    reply = kernel.run(
        cell(
            """
            a = torch.ones(500, 500, requires_grad=True)
            (a @ a).sum().backward()
            def multiply():
                b = torch.ones(300, 300, requires_grad=True)
                (b @ b).sum().backward()
                return b.grad.sum().item()
            print(launch(multiply, nprocs=2, threads=2)[0])
            """
        )
    )
    assert reply.out == "54000000.0\n"


def test_every_line_arrives_whole_and_labelled_in_the_cell_that_printed_it(kernel: Kernel) -> None:
    reply = kernel.run(
        cell(
            """
            def talk():
                import sys
                for i in range(200):
                    print("line", i, "of", rank())
                print("to err", file=sys.stderr)
                os.write(1, b"bytes \\xff\\n")
                print("no newline", end="")
            results = launch(talk, nprocs=2)
            """
        )
    )
    for rank in (0, 1):
        mine = [line for line in reply.out.splitlines() if line.startswith(f"[rank {rank}] ")]
        lines = [f"[rank {rank}] line {i} of {rank}" for i in range(200)]
        assert mine == [*lines, f"[rank {rank}] bytes \ufffd", f"[rank {rank}] no newline"]
        assert f"[rank {rank}] to err\n" in reply.err
    assert len(reply.out.splitlines()) == 404
    counted = "print(results.output[1].count('of 1\\n'), 'to err\\n' in results.output[1])"
    assert kernel.run(counted).out == "200 True\n"


def test_a_failing_rank_fails_the_cell_and_shows_the_cells_line(kernel: Kernel) -> None:
    reply = kernel.run(
        cell(
            """
            def train(loss):
                if rank() == 1:
                    raise ValueError(f"bad {loss}")  # the learner's line
                dist.all_reduce(torch.ones(1))
            launch(train, 3, nprocs=2)
            """
        )
    )
    assert (reply.status, reply.ename) == ("error", "RankFailed")
    assert reply.evalue.startswith("rank 1 of 2 raised ValueError: bad 3")
    assert 'raise ValueError(f"bad {loss}")  # the learner\'s line' in reply.evalue
    assert "Cell In[" in reply.evalue
    assert "ipykernel_" not in reply.evalue
    assert "in all_reduce, Cell In[" in reply.evalue


def test_progress_is_one_display_with_a_clean_last_state(kernel: Kernel) -> None:
    reply = kernel.run(
        cell(
            """
            def train():
                for step in range(1, 31):
                    report(step=step, loss=torch.tensor(1.0) / step)
                    time.sleep(0.02)
            launch(train, nprocs=2);
            """
        )
    )
    assert len(reply.shown) == 1
    (text,) = reply.shown.values()
    assert text.startswith("2 ranks: step 30, loss 0.03333, ")
    assert text.endswith("steps/s, done")


BLOCKED = {
    "sleep": "time.sleep(60)",
    "busy loop": "while True: pass",
    "collective": "dist.all_reduce(torch.ones(2)) if rank() else time.sleep(60)",
    "mutual recv": "dist.recv(torch.ones(2), 1 - rank())",
    "swallows": "while True:\n        try: time.sleep(60)\n        except BaseException: pass",
}


@pytest.mark.parametrize("how", BLOCKED)
def test_the_stop_button_ends_the_cell_and_the_ranks_within_a_second(
    kernel: Kernel, how: str
) -> None:
    before = {p.pid for p in kernel.family()}
    body = f"def block():\n    print('now', rank())\n    {BLOCKED[how]}\nlaunch(block, nprocs=2)"
    message = kernel.send(body)
    kernel.wait_for_output("now")
    time.sleep(0.3)
    began = time.monotonic()
    kernel.stop()
    reply = kernel.reply(message)
    took = time.monotonic() - began
    assert reply.ename == "KeyboardInterrupt"
    assert "stopped; the ranks have ended" in reply.err
    assert {p.pid for p in kernel.family()} <= before
    assert kernel.run("print(launch(reduce, nprocs=2)[0])").out == "4.0\n"
    assert took < 5.0  # a second on a quiet machine; tests may share theirs


def test_the_magic_keeps_state_shows_last_expressions_and_picks_ranks(kernel: Kernel) -> None:
    kernel.run("%load_ext pardemo")
    first = kernel.run("%%ranks 2\nimport torch.distributed as dist\nx = 10 * dist.get_rank()\nx")
    assert sorted(first.out.splitlines()) == ["[rank 0] 0", "[rank 1] 10"]
    assert kernel.run("%%ranks --only 1\nx += 1\nx").out == "[rank 1] 11\n"
    assert kernel.run("%ranks pull x").shown == {"execute_result": "[0, 11]"}
    assert kernel.run("y = 7\n%ranks push y").status == "ok"
    assert sorted(kernel.run("%%ranks\nx + y").out.splitlines()) == ["[rank 0] 7", "[rank 1] 18"]
    assert kernel.run("%%ranks\nx;").out == ""
    table = kernel.run("%ranks status").out.splitlines()
    assert len(table) == 3
    assert all("cpu" in row and row.endswith("yes") for row in table[1:])


def test_the_magic_says_when_the_state_is_gone(kernel: Kernel) -> None:
    kernel.run("%load_ext pardemo")
    kernel.run("%%ranks 2\nx = 1")
    failed = kernel.run("%%ranks\n1 / (1 - dist.get_rank()) if 'dist' in globals() else 1 / 0")
    assert (failed.status, failed.ename) == ("error", "RankFailed")
    assert "ZeroDivisionError" in failed.evalue
    assert "Cell In[" in failed.evalue
    after = kernel.run("%%ranks\n'x' in globals()")
    assert "the state of the old ones is gone" in after.out
    assert "[rank 0] False" in after.out
    assert "instead of 2" in kernel.run("%%ranks 1\n5").out
    assert "have ended" in kernel.run("%ranks reset").out
    assert kernel.run("%ranks status").out == "no ranks run\n"


def test_a_slip_of_the_pen_does_not_cost_the_state(kernel: Kernel) -> None:
    kernel.run("%load_ext pardemo")
    kernel.run("%%ranks 2\nkept = 1")
    assert kernel.run("%%ranks\nkept +").ename == "SyntaxError"
    assert kernel.run("%%ranks --only 9\nkept").status == "error"
    assert kernel.run("%%ranks --only 0\nkept").out == "[rank 0] 1\n"


def test_a_launch_from_another_thread_works(kernel: Kernel) -> None:
    reply = kernel.run(
        "import asyncio\nprint((await asyncio.to_thread(launch, reduce, nprocs=2))[0])"
    )
    assert reply.out == "4.0\n"


def test_pressing_stop_twice_while_ranks_start_leaves_a_kernel_that_works(kernel: Kernel) -> None:
    before = {p.pid for p in kernel.family()}
    for delay in (0.0, 0.05, 0.1):
        cell = "print('begun', flush=True)\nlaunch(lambda: time.sleep(60), nprocs=2)"
        message = kernel.send(cell)
        kernel.wait_for_output("begun")
        time.sleep(delay)
        kernel.stop()
        time.sleep(0.02)
        kernel.stop()
        assert kernel.reply(message).status == "error"
    assert kernel.run("print(launch(reduce, nprocs=2)[0])").out == "4.0\n"
    assert {p.pid for p in kernel.family()} <= before
