"""Configuration loading: what wins, where a value came from, and that every mistake is named at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_fapo.config import Config
from megatron_fapo.config.load import ConfigError, leaves, load_config
from megatron_fapo.config.root import Purpose
from megatron_fapo.config.show import diff, dump_yaml, show


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def problems(paths: list[Path], overrides: list[str], purpose: Purpose | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(paths, overrides, purpose)
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return caught.value.problems


def test_defaults_are_a_valid_configuration():
    loaded = load_config([], [])
    assert loaded.config == Config()
    assert set(loaded.origins.values()) == {"default"}


def test_later_files_win_over_earlier_ones_and_overrides_over_files(tmp_path):
    first = write(tmp_path / "first.yaml", "seed: 1\npolicy:\n  optimizer:\n    lr: 1e-5\n    eps: 2e-8\n")
    second = write(tmp_path / "second.yaml", "policy:\n  optimizer: {lr: 3e-5}\nseed: 2\n")
    loaded = load_config([first, second], ["seed=3"])
    assert loaded.config.seed == 3
    assert loaded.config.policy.optimizer.lr == 3e-5
    assert loaded.config.policy.optimizer.eps == 2e-8
    assert loaded.origins["seed"] == "command line"
    assert loaded.origins["policy.optimizer.lr"] == f"{second}:2"
    assert loaded.origins["policy.optimizer.eps"] == f"{first}:5"
    assert loaded.origins["device"] == "default"


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "1.0e-5", "0.00001", ".00001"])
def test_numbers_are_numbers_however_they_are_written(text):
    config = load_config([], [f"policy.optimizer.lr={text}", f"policy.megatron.layernorm_epsilon={text}"]).config
    assert config.policy.optimizer.lr == 1e-5
    assert config.policy.megatron == {"layernorm_epsilon": 1e-5}


def test_a_file_extends_another_relative_to_itself(tmp_path):
    write(tmp_path / "base.yaml", "seed: 1\ngenrm: {enabled: false}\ndata:\n  eval: {a: x, b: y}\n")
    child = write(tmp_path / "sub" / "child.yaml", "seed: 2\nextends: ../base.yaml\ndata:\n  eval: {b: z}\n")
    loaded = load_config([child], [])
    assert loaded.config.seed == 2
    assert loaded.config.data.eval == {"a": "x", "b": "z"}
    assert loaded.origins["genrm.enabled"] == f"{tmp_path / 'base.yaml'}:2"
    assert loaded.origins["data.eval.b"] == f"{child}:4"


def test_anchors_and_merge_keys_keep_their_lines(tmp_path):
    file = write(
        tmp_path / "a.yaml",
        "rollout:\n  sampling: &greedy\n    top_k: 5\n    top_p: 0.5\n"
        "training:\n  evaluation:\n    <<: *greedy\n    top_k: 9\n",
    )
    found = problems([file], [])  # top_k is merged in, written over, and no key of an evaluation
    assert found == [f"training.evaluation.top_k ({file}:8): unknown key; did you mean training.evaluation.top_p?"]
    config = load_config(
        [write(tmp_path / "b.yaml", file.read_text().replace("    top_k: 9\n", "").replace("    top_k: 5\n", ""))], []
    )
    assert config.config.training.evaluation.top_p == 0.5
    assert config.origins["training.evaluation.top_p"].endswith("b.yaml:3")


def test_a_circle_of_files_is_refused(tmp_path):
    write(tmp_path / "a.yaml", "extends: b.yaml\n")
    write(tmp_path / "b.yaml", "extends: a.yaml\n")
    assert "extends itself" in problems([tmp_path / "a.yaml"], [])[0]


def test_an_empty_map_empties_and_lists_are_replaced(tmp_path):
    file = write(tmp_path / "a.yaml", "data:\n  train: [a, b]\n  eval: {a: x}\n")
    config = load_config([file], ["data.eval={}", "data.train=[c]"]).config
    assert config.data.eval == {}
    assert config.data.train == ["c"]


def test_every_violation_is_reported_at_once_with_its_origin(tmp_path):
    file = write(
        tmp_path / "bad.yaml",
        "sead: 1\n"
        "policy:\n"
        "  optimizer:\n"
        "    lr: -1\n"
        "    schedule: cosine\n"
        "training:\n"
        "  prompts_per_step: 10\n"
        "  steps: many\n",
    )
    found = problems([file, tmp_path / "absent.yaml"], ["rollout.replicas=0", "genrm.prompt_form=xml", "novalue"])
    expected = [
        f"{tmp_path / 'absent.yaml'}: cannot be read",
        "novalue (command line): not an override",
        f"sead ({file}:1): unknown key; did you mean seed?",
        f"policy.optimizer.lr = -1 ({file}:4): must be greater than 0",
        f"training.steps = 'many' ({file}:8): must be a valid integer",
        "rollout.replicas = 0 (command line): must be greater than or equal to 1",
        "genrm.prompt_form = 'xml' (command line): must be one of tagged, raw",
        f"policy.optimizer.schedule = 'cosine' ({file}:5), policy.optimizer.decay_steps = None (default)",
        f"training.prompts_per_step = 10 ({file}:7), training.prompts_per_mini_batch = 32 (default)",
    ]
    assert len(found) == len(expected)
    for start in expected:
        assert sum(problem.startswith(start) for problem in found) == 1, start


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("policy.optimzer.lr=1", "policy.optimzer (command line): unknown key; did you mean policy.optimizer?"),
        ("polcy.optimizer.lr=1", "did you mean policy?"),
        ("flawed_penalty=1", "did you mean reward.flawed_penalty?"),
        ("samples_per_promt=1", "did you mean rollout.samples_per_prompt or training.evaluation.samples_per_prompt?"),
        ("zzzz=1", "fapo config show --docs"),
        ("seed.x=1", "seed is a value and has no keys"),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest_name(override, suggestion):
    (problem,) = problems([], [override])
    assert suggestion in problem


def test_a_misspelt_section_is_one_problem(tmp_path):
    file = write(tmp_path / "a.yaml", "rolout:\n  replicas: 1\n  max_num_seqs: 1\n")
    assert len(problems([file], [])) == 1


def test_broken_yaml_names_its_line_and_duplicate_keys_are_refused(tmp_path):
    broken = write(tmp_path / "broken.yaml", "seed: 1\npolicy: [a\nseed: 2\n")
    twice = write(tmp_path / "twice.yaml", "rollout:\n  replicas: 1\n  replicas: 2\n")
    a_list = write(tmp_path / "list.yaml", "- seed\n")
    found = problems([broken, twice, a_list], [])
    assert found[0].startswith(f"{broken}:3: not valid YAML")
    assert "rollout.replicas" in found[1]
    assert "written twice" in found[1]
    assert found[2].startswith(f"{a_list}:1: expected a map")


TURNS = ["rollout.colocated=true", "policy.offload=true"]


@pytest.mark.parametrize(
    ("overrides", "fields"),
    [
        (["training.prompts_per_step=48"], "training.prompts_per_mini_batch"),
        (
            ["training.prompts_per_mini_batch=1", "rollout.samples_per_prompt=2", "policy.parallel.data=4"],
            "policy.parallel.data",
        ),
        (["policy.parallel.sequence_parallel=true"], "policy.parallel.tensor"),
        (["policy.optimizer.schedule=linear"], "policy.optimizer.decay_steps"),
        (["policy.optimizer.schedule=linear", "policy.optimizer.decay_steps=10"], "policy.optimizer.warmup_steps"),
        (["policy.optimizer.min_lr=1"], "policy.optimizer.min_lr"),
        (["rollout.sampling.temperature=0"], "rollout.sampling.temperature"),
        (["reward.rho_shift=1", "reward.flawed_penalty=0.5"], "reward.rho_shift"),
        (["data.question_key=question"], "data.answer_key"),
        (["policy.offload=true"], "rollout.colocated"),
        (["rollout.colocated=true"], "policy.offload"),
        ([*TURNS, "cluster.train_nodes=1", "cluster.rollout_nodes=1"], "cluster.rollout_nodes"),
        ([*TURNS, "weight_sync.in_flight=true"], "weight_sync.in_flight"),
        ([*TURNS, "weight_sync.node_link=map"], "weight_sync.node_link"),
        (["policy.optimizer.offload_fraction=1", "policy.optimizer.moments_dtype=fp8"], "moments_dtype"),
        (["policy.optimizer.main_dtype=float16", "policy.dtype=float32"], "policy.dtype"),
    ],
)
def test_rules_across_sections(overrides, fields):
    (problem,) = problems([], overrides)
    assert fields in problem


NO_GENRM = "genrm.enabled=false"


@pytest.mark.parametrize(
    ("overrides", "fields", "purposes"),
    [
        ([], "genrm.model_path", {"train", "evaluate"}),
        (["genrm.model_path=x", "genrm.servers=0"], "genrm.servers = 0", {"train", "evaluate"}),
        (["genrm.judge_eval=false"], "genrm.model_path", {"train"}),
        ([NO_GENRM, "rollout.max_response_tokens=4096"], "reward.overlong.buffer_tokens", {"train", "evaluate"}),
        ([NO_GENRM, "training.evaluation.every_steps=5"], "data.eval", {"train"}),
        ([NO_GENRM], "", set()),
        (["genrm.urls=['http://a/v1']", "genrm.servers=0"], "", set()),
        (["genrm.urls=['http://a/v1']"], "genrm.model_path", {"train", "evaluate"}),
        (["genrm.rendezvous=judges.json", "genrm.servers=0"], "", set()),
        (["genrm.rendezvous=judges.json"], "genrm.model_path", {"train", "evaluate"}),
        (["genrm.rendezvous=judges.json", "genrm.model_path=x"], "", set()),
        (["reward.compute_score=a:b"], "", set()),
        ([NO_GENRM, *TURNS, "rollout.tensor_parallel=2"], "rollout.tensor_parallel", {"train"}),
        ([NO_GENRM, *TURNS], "", set()),
    ],
)
def test_rules_of_one_use_do_not_trouble_another(overrides, fields, purposes):
    for purpose in (None, "train", "evaluate", "warmup"):
        if purpose in purposes:
            (problem,) = problems([], overrides, purpose)
            assert fields in problem
        else:
            load_config([], overrides, purpose)


@pytest.mark.parametrize(
    "override",
    [
        "genrm.servers=0",
        "genrm.model_path=null",
        "genrm.urls=['http://a/v1']",
        "genrm.rendezvous=judges.json",
        "genrm.judge_function=a:b",
        NO_GENRM,
        "reward.task=critic",
    ],
)
def test_a_judge_service_is_servers_of_a_model_and_nothing_else(override):
    load_config([], ["genrm.model_path=x"], "serve")
    (problem,) = problems([], ["genrm.model_path=x", override], "serve")
    assert "a judge service starts genrm.servers > 0 servers of genrm.model_path" in problem


@pytest.mark.parametrize(
    "overrides",
    [
        ["rollout.max_response_tokens=4096", "reward.overlong.enabled=false"],
        ["reward.rho_shift=1"],
        ["policy.optimizer.schedule=linear", "policy.optimizer.decay_steps=11"],
        ["training.evaluation.every_steps=0"],
        ["policy.parallel.sequence_parallel=true", "policy.parallel.tensor=2"],
    ],
)
def test_what_the_rules_allow(overrides):
    load_config([], overrides)


def test_a_rule_is_not_judged_by_a_value_that_was_refused():
    (problem,) = problems([], ["training.prompts_per_mini_batch=none", "training.prompts_per_step=7"])
    assert problem.startswith("training.prompts_per_mini_batch = 'none'")


OVERRIDES = ["policy.optimizer.lr=1e-5", "data.eval.aime=x.jsonl", "policy.megatron={a: {b: 1}}", "genrm.urls=['#']"]


def test_the_resolved_tree_loads_to_the_same_configuration(tmp_path):
    loaded = load_config([], OVERRIDES)
    for text in (dump_yaml(loaded.config), show(loaded), show(loaded, docs=True)):
        assert load_config([write(tmp_path / "resolved.yaml", text)], []).config == loaded.config


def test_show_names_the_origin_of_every_leaf(tmp_path):
    file = write(tmp_path / "a.yaml", "seed: 7\n")
    loaded = load_config([file], OVERRIDES)
    text = show(loaded)
    assert text.count("  # ") == len(list(leaves(loaded.config)))
    lines = {line.split(":")[0].strip(): line for line in text.splitlines()}
    assert lines["seed"].split("  # ") == [lines["seed"].split("  # ")[0], f"{file}:1"]
    assert lines["aime"].endswith("# command line")
    assert lines["device"].endswith("# default")
    assert len({line.index("  # ") for line in text.splitlines() if "  # " in line and len(line) < 80}) == 1


def test_docs_hold_the_meaning_of_every_documented_field():
    text = " ".join(show(load_config([], []), docs=True).replace("#", " ").split())
    assert "-1 keeps the whole vocabulary." in text
    assert "Sets lambda = 2 / (rho_shift + 1) in place of flawed_penalty" in text


def test_diff_prints_only_what_differs():
    a = load_config([], ["seed=1", "data.eval.x=y"])
    b = load_config([], ["seed=2"])
    assert diff(a, b) == "seed: 1 (command line) -> 2 (command line)\ndata.eval.x: y (command line) -> unset\n"
    assert diff(a, a) == ""


@pytest.mark.parametrize("example", sorted(Path(__file__).parents[2].glob("examples/*.yaml")), ids=lambda p: p.name)
def test_the_examples_load(example):
    assert isinstance(yaml.safe_load(example.read_text()), dict)
    load_config([example], [])
