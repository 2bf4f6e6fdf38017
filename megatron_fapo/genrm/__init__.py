"""What judges solutions: prompts, verdicts, the rule verifier, the server pool and its client, the reward loop."""
