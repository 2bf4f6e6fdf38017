"""How many labels of a `fapo genrm label` run on the testbed its oracle confirms: single votes, and agreed ones.

python benchmarks/label_oracle.py PROMPTS.jsonl ROWS.jsonl.journal.jsonl [--votes 3]
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

from megatron_fapo.data.oracle import judge
from megatron_fapo.observe.files import read_json_lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("journal", type=Path)
    parser.add_argument("--votes", type=int, default=3, help="labelling.votes of the run")
    args = parser.parse_args()
    questions = {
        f"{row['data_source']}/{row['extra_info']['index']}": row["extra_info"]["question"]
        for row in read_json_lines(args.prompts)
    }
    texts: dict[tuple[str, ...], str] = {}
    votes: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for record in read_json_lines(args.journal):
        if record["kind"] == "solution":
            texts[tuple(map(str, record["key"]))] = record["text"]
        elif record["kind"] == "vote" and record.get("index") is not None:
            votes[tuple(map(str, record["key"]))].append(record["index"])
    truth = {key: judge(questions[key[1]], "", texts[key]) for key in votes}
    agreed = [key for key, cast in votes.items() if len(cast) >= args.votes and len(set(cast)) == 1]
    for name, keys in (("first votes", list(votes)), ("agreed", agreed)):
        right = sum(votes[key][0] == truth[key] for key in keys)
        print(f"{name}: {right} of {len(keys)} confirmed ({right / len(keys):.0%})")


if __name__ == "__main__":
    main()
