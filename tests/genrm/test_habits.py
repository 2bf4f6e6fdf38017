"""What genrm/ does without: text that is evaluated, failures that are swallowed, waits that nothing ends.

A wait is bounded where it stands under a deadline (`asyncio.timeout` or a Cut, which is one), has a timeout of its own,
is a sleep, or awaits a function of the project, which is read in its turn. The others are listed with what ends them.
The check cannot see whether a bound is a sensible one, nor what libraries and users' functions wait for.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import megatron_fapo.genrm

FILES = sorted(Path(megatron_fapo.genrm.__file__).parent.glob("*.py"))
EVALUATES = {"eval", "exec", "compile", "__import__"}
OF_THE_OUTSIDE = {
    *("get", "put", "join", "acquire", "wait", "communicate", "drain", "read", "readline", "readexactly", "readuntil"),
    *("post", "request", "json", "text", "connect", "gather", "shield", "to_thread"),
}
"""Awaited names that are no functions of the project: network, processes, queues, locks, threads, other tasks."""
DEADLINES = ("asyncio.timeout", "cut", "limit")

TASKS = "they are cancelled first, and what they wait for is read here"
PROBES = "each has PROBE_TIMEOUT_S"
JUDGED = "a verdict's request_timeout_s and deadline_s, and pool_empty_timeout_s when no server answers"
TURN = "judging follows the rollout, which has deadlines of its own; close cancels"
KILLED = "the process has been killed"
ALLOWED = {
    ("asking.py", "_hedged"): "the request's own Cut",
    ("client.py", "judge"): JUDGED,
    ("client.py", "_by_votes"): JUDGED,
    ("client.py", "_in_windows"): JUDGED,
    ("client.py", "_cancel"): TASKS,
    ("dispatch.py", "enter"): "pool_empty_timeout_s when no server answers; while one does, places become free",
    ("gateway.py", "_asked"): "the caller is a function on the verifier's clock; its end closes the connection",
    ("judge_function.py", "judge"): "the user's own function: it must be quick, or bound its waits",
    ("label.py", "sample_from_urls"): "each request has request_timeout_s",
    ("membership.py", "check"): PROBES,
    ("membership.py", "close"): TASKS,
    ("membership.py", "_look"): PROBES + "; a filesystem that hangs holds a thread, not the loop",
    ("reward_loop.py", "close"): TASKS,
    ("router.py", "_call"): "the session's own timeout",
    ("router.py", "stop"): KILLED,
    ("scoring.py", "take_all"): "places become free as samples are scored",
    ("scoring.py", "score_stream"): "samples that are being scored, or the rollout that makes them",
    ("scoring.py", "_score_by_rule"): TURN,
    ("scoring.py", "_score_by_function"): TURN,
    ("server.py", "stop"): KILLED,
    ("server_process.py", "obey"): "orders come when they come; the parent's end closes the pipe",
    ("server_process.py", "serve"): "serving is what the process is for",
    ("verifier.py", "send"): "its callers' verifier_timeout_s or START_TIMEOUT_S",
    ("verifier.py", "receive"): "its callers' verifier_timeout_s or START_TIMEOUT_S",
    ("verifier.py", "kill"): KILLED,
    ("verifier.py", "start"): "each worker has START_TIMEOUT_S; the tokenizer is a file",
    ("verifier.py", "close"): TASKS,
    ("verifier.py", "_call"): "workers become free: each call has verifier_timeout_s, a replacement START_TIMEOUT_S",
}
"""(file, function): what ends its waits."""


def unbounded(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Function and name of each wait for the outside that stands under no deadline."""

    def visit(node: ast.AST, function: str, under: bool) -> Iterator[tuple[str, str]]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function, under = node.name, False
        if isinstance(node, ast.AsyncWith):
            names = [ast.unparse(item.context_expr) for item in node.items]
            outside = [name for name in names if name.partition("(")[0].split(".")[-1] in OF_THE_OUTSIDE]
            under_this = under or any(name.startswith(DEADLINES) for name in names)
            yield from ((function, name) for name in outside if not under_this)
            under = under_this
        if isinstance(node, ast.Await) and not under:
            awaited = node.value
            name = ast.unparse(awaited.func if isinstance(awaited, ast.Call) else awaited)
            own = isinstance(awaited, ast.Call) and name.split(".")[-1] not in OF_THE_OUTSIDE
            if not own and not (isinstance(awaited, ast.Call) and has_timeout(awaited)):
                yield function, name
        if isinstance(node, ast.Call) and not node.args and not has_timeout(node):
            name = ast.unparse(node.func)  # not awaited: the same names of subprocess and threads, which take a timeout
            if name.endswith(("process.wait", ".communicate", "thread.join")):
                yield function, name
        for child in ast.iter_child_nodes(node):
            yield from visit(child, function, under)

    return visit(tree, "", False)


def has_timeout(call: ast.Call) -> bool:
    return any(keyword.arg == "timeout" for keyword in call.keywords)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_nothing_is_evaluated_swallowed_or_waited_for_without_end(file: Path) -> None:
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            assert not (isinstance(node.func, ast.Name) and node.func.id in EVALUATES), (file.name, node.lineno)
            assert ast.unparse(node.func) != "ray.get" or has_timeout(node), (file.name, node.lineno)
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, (file.name, node.lineno, "bare except")
            assert not all(isinstance(each, ast.Pass) for each in node.body), (file.name, node.lineno, "swallowed")
    waiting = {function for function, _ in unbounded(tree)}
    assert waiting - {function for name, function in ALLOWED if name == file.name} == set(), (
        "bound it, or say what ends it"
    )
    assert {function for name, function in ALLOWED if name == file.name} - waiting == set(), (
        "no longer: take it off the list"
    )


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("await queue.get()", True),
        ("await future", True),
        ("await self._process.wait()", True),
        ("self._process.wait()", True),
        ("async with session.post(url) as reply: x", True),
        ("async with asyncio.timeout(3):\n  await queue.get()", False),
        ("async with asyncio.timeout(3), session.post(url) as reply:\n  await reply.text()", False),
        ("await asyncio.wait(tasks, timeout=3)", False),
        ("await asyncio.wait_for(queue.get(), 3)", False),
        ("await asyncio.sleep(3)", False),
        ("await self._ask(server)", False),
        ("self._process.wait(timeout=3)", False),
    ],
)
def test_what_counts_as_a_wait_without_end(code: str, found: bool) -> None:
    body = "\n".join(f"  {line}" for line in code.split("\n"))
    assert bool(list(unbounded(ast.parse(f"async def f():\n{body}")))) is found
