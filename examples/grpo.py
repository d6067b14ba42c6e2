"""Let a Llama learn additions and their form by reinforcement: TRL's GRPOTrainer, with texts by the engine.

    python examples/grpo.py --steps 100 --output ./grpo

The output folder gets log.json, with the mean reward, the seconds and the tokens of each step, and reward.png if
matplotlib is installed. `--rollouts generate` lets the trainer write by `model.generate`, for comparison.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import re
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from small_llama import default_llama, load_llama
from transformers import TrainerCallback, set_seed
from trl import GRPOConfig, GRPOTrainer

from llama_te_convert import convert_llama_hf_to_te
from llama_te_infer.rl import rollout_func

LARGEST = 12  # of the numbers to add
EXAMPLES = "".join(f"Question: {a} + {b}\nAnswer: <answer>{a + b}</answer>\n\n" for a, b in ((2, 3), (10, 1), (7, 5)))


def main() -> None:
    options = parse_options()
    set_seed(options.seed)
    hf, tokenizer = load_llama(options.model)
    has_gpu = torch.cuda.is_available()
    model = convert_llama_hf_to_te(hf.to("cuda" if has_gpu else "cpu"))
    rollouts = Rollouts(rollout_func(dtype=torch.bfloat16 if has_gpu else None))
    reward = Reward()
    trainer = GRPOTrainer(
        model,
        reward_funcs=reward,
        args=GRPOConfig(
            output_dir=str(options.output / "checkpoints"),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            num_generations=8,
            max_completion_length=16,
            learning_rate=options.learning_rate,
            lr_scheduler_type="constant",
            seed=options.seed,
            bf16=has_gpu,
            use_cpu=not has_gpu,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=questions(options.batch // 8 * options.steps, options.seed),
        processing_class=tokenizer,
        rollout_func=rollouts if options.rollouts == "engine" else None,
        callbacks=[Clock(rollouts, reward)],
    )
    trainer.train()
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "log.json").write_text(
        json.dumps({"rollouts": options.rollouts, "steps": reward.steps}, indent=1)
    )
    plot(reward.steps, options.output / "reward.png")
    last = reward.steps[-max(1, options.steps // 10) :]
    print(f"Mean reward of the first step {reward.steps[0]['reward']:.2f}, of the last tenth "
          f"{sum(step['reward'] for step in last) / len(last):.2f}, of 1 at most.")  # fmt: skip


def questions(count: int, seed: int) -> Dataset:
    """Return prompts with their results."""
    source = random.Random(seed)
    pairs = [(source.randint(0, LARGEST), source.randint(0, LARGEST)) for _ in range(count)]
    prompts = [f"{EXAMPLES}Question: {a} + {b}\nAnswer:" for a, b in pairs]
    return Dataset.from_dict({"prompt": prompts, "result": [a + b for a, b in pairs]})


class Reward:
    """Rewards the first line of a text: 1 for the result in its form, 0.4 for the form, 0.2 for the result alone.

    Attributes:
        steps: For each step the mean reward and more.
    """

    __name__ = "addition"

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def __call__(self, completions: list[str], result: list[int], **columns: Any) -> list[float]:
        rewards = [self.of(text, number) for text, number in zip(completions, result, strict=True)]
        self.steps.append({"reward": sum(rewards) / len(rewards)})
        return rewards

    @staticmethod
    def of(text: str, result: int) -> float:
        line = text.strip().partition("\n")[0].strip()
        if line == f"<answer>{result}</answer>":
            return 1.0
        if re.fullmatch(r"<answer>\d+</answer>", line):
            return 0.4
        return 0.2 if str(result) in re.findall(r"\d+", line) else 0.0


class Rollouts:
    """A `rollout_func` that notes how long it takes, and how many tokens it writes."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.seconds = self.tokens = 0.0

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        begin = time.perf_counter()
        output: dict[str, list[Any]] = self.function(prompts, trainer)
        self.seconds, self.tokens = time.perf_counter() - begin, sum(map(len, output["completion_ids"]))
        return output


class Clock(TrainerCallback):  # type: ignore[misc]
    """Notes the time of each step."""

    def __init__(self, rollouts: Rollouts, reward: Reward) -> None:
        self.rollouts, self.reward = rollouts, reward

    def on_step_begin(self, *arguments: Any, **options: Any) -> None:
        self.begin = time.perf_counter()

    def on_step_end(self, *arguments: Any, **options: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.reward.steps[-1] |= {
            "seconds": time.perf_counter() - self.begin,
            "rollout_seconds": self.rollouts.seconds,
            "rollout_tokens": self.rollouts.tokens,
        }


def plot(steps: list[dict[str, float]], path: Path) -> None:
    """Draw the reward of each step."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3))
    axes.plot(range(1, len(steps) + 1), [step["reward"] for step in steps], linewidth=1)
    axes.set(xlabel="step", ylabel="mean reward", ylim=(0, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        default=default_llama(),
        help='a folder in the Hugging Face format, "smollm2" or "random" (default here: %(default)s)',
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=64, help="texts of a step, 8 of each question (default: 64)")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rollouts", choices=["engine", "generate"], default="engine")
    parser.add_argument("--output", type=Path, default=Path("grpo"), help="the folder for the results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
