"""A real vLLM server: it starts, answers, and goes; and when it cannot start, its own words say why."""

from __future__ import annotations

import json
import socket
import threading
import urllib.request

import pytest

from megatron_fapo.config.genrm import GenRMConfig
from megatron_fapo.errors import UserError
from megatron_fapo.genrm.server import GenRMServer, ServerStartError, ServerTurnError
from megatron_fapo.rollout.guard import tagged_pids


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from megatron_fapo.data.tokenizer import init_tiny_model

    path = tmp_path_factory.mktemp("genrm")
    init_tiny_model(path, 0)
    return path


def make_server(checkpoint, log, **fields):
    config = GenRMConfig(model_path=str(checkpoint), max_model_len=512, **fields)
    return GenRMServer(config, device="cpu", dtype="float32", log_path=str(log))


def post(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def test_server_answers_and_stops_without_a_trace(checkpoint, tmp_path):
    server = make_server(checkpoint, tmp_path / "genrm-0.log", served_model="judge", vllm={"max_num_seqs": 8})
    url = server.start()
    tag = server._guard.tag
    assert server.alive()
    with urllib.request.urlopen(f"{url}/models") as response:
        assert json.load(response)["data"][0]["id"] == "judge"
    body = {"model": "judge", "messages": [{"role": "user", "content": "How many"}], "max_tokens": 300, "seed": 5}
    first = post(f"{url}/chat/completions", body)["choices"][0]
    assert post(f"{url}/chat/completions", body)["choices"][0]["message"] == first["message"]
    # Seeded prompts that do not fit one batch together: with chunked prefill they end vLLM's CPU engine.
    long = body | {"messages": [{"role": "user", "content": "x" * 150}], "max_tokens": 4}
    asks = [threading.Thread(target=post, args=(f"{url}/chat/completions", long | {"seed": i})) for i in range(40)]
    for ask in asks:
        ask.start()
    for ask in asks:
        ask.join()
    post(f"{url}/chat/completions", body)

    server.sleep()
    late: list[dict] = []
    ask = threading.Thread(target=lambda: late.append(post(f"{url}/chat/completions", body)))
    ask.start()
    ask.join(1.0)
    assert late == [], "a server that sleeps answers nobody"
    server.wake()
    ask.join()
    assert late[0]["choices"][0]["message"] == first["message"]
    assert len(tagged_pids(tag)) >= 2, "API server and engine core"
    server.sleep()
    server._process.kill()
    server._process.wait()
    server.sleep()  # it holds nothing
    with pytest.raises(ServerTurnError, match="did not wake"):
        server.wake()
    server.stop()
    assert tagged_pids(tag) == []
    assert not server.alive()
    port = int(url.split(":")[2].split("/")[0])
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0
    server.stop()


def test_server_that_ends_gives_its_last_words(checkpoint, tmp_path):
    log = tmp_path / "genrm-0.log"
    server = make_server(checkpoint, log, vllm={"max_num_sequences": 8})
    with pytest.raises(ServerStartError, match=r"exit code 2(.|\n)*max-num-sequences") as error:
        server.start()
    assert str(log) in str(error.value)
    assert not error.value.lost


def test_server_that_does_not_answer_in_time_is_removed(checkpoint, tmp_path):
    server = make_server(checkpoint, tmp_path / "genrm-0.log", start_timeout_s=1.0)
    with pytest.raises(ServerStartError, match="did not answer in time") as error:
        server.start()
    assert error.value.lost
    assert not server.alive()


def test_stop_ends_a_start_that_is_under_way(checkpoint, tmp_path):
    server = make_server(checkpoint, tmp_path / "genrm-0.log")
    stopping = threading.Timer(1.0, server.stop)
    stopping.start()
    with pytest.raises(ServerStartError, match="ended with exit code"):
        server.start()
    stopping.join()
    assert not server.alive()


def test_options_follow_the_configuration(checkpoint, tmp_path):
    server = make_server(
        checkpoint, tmp_path / "log", vllm={"max_num_seqs": 64, "hf_overrides": {"a": 1}, "async": False}
    )
    words = server.options()
    for name, value in {"--max-model-len": "512", "--max-num-seqs": "64", "--hf-overrides": '{"a": 1}'}.items():
        assert words[words.index(name) + 1] == value
    assert "--no-async" in words
    assert "--enforce-eager" in words


def test_options_that_other_fields_set_are_refused(checkpoint, tmp_path):
    with pytest.raises(UserError, match=r"genrm.vllm: dtype, model is set by other fields"):
        make_server(checkpoint, tmp_path / "log", vllm={"dtype": "half", "model": "x"}).options()


def test_missing_model_is_named_before_anything_starts(tmp_path):
    config = GenRMConfig(model_path=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"nowhere/config.json does not exist"):
        GenRMServer(config, device="cpu", dtype="float32", log_path=str(tmp_path / "log")).start()
    with pytest.raises(UserError, match=r"genrm.model_path is not set"):
        GenRMServer(GenRMConfig(), device="cpu", dtype="float32", log_path="log").start()
