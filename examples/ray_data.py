"""Prompts of a file answered by a stage of Ray Data: two actors, each with the demo model and half of its experts.

pip install 'moeflow[ray]' 'ray[data]'
python examples/ray_data.py examples/prompts.jsonl answers
"""

import sys

import ray

from moe.launch.ray_data import Answers


def main(source: str, target: str) -> None:
    ray.init(log_to_driver=False)
    prompts = ray.data.read_json(source)
    settings = ("offload.budget=0.5", "threads=1")
    answers = prompts.map_batches(
        Answers,
        fn_constructor_args=("examples/tinymoe", settings),
        fn_constructor_kwargs={"max_tokens": 16, "temperature": 0.0},
        batch_size=32,
        concurrency=2,
        num_cpus=0.5,  # of two cores one is left for reading and writing, without which nothing begins
    )
    answers.write_json(target)


if __name__ == "__main__":
    main(*sys.argv[1:])
